"use strict";
(() => {
  const data = JSON.parse(document.getElementById("payload").textContent);
  const $ = (id) => document.getElementById(id);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const hidden = new Set(); // methods switched off; kept when the view changes
  const all = Object.values(data.entries);
  let view = data.views[0];

  const make = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };
  const shape = (method) => data.shapes[method];
  const color = (method) => data.colors[method][dark.matches ? 1 : 0];
  const rank = (m) => (m === data.dense ? 0 : data.controls.includes(m) ? 1 : 2);
  const methodsOf = (v) => [...new Set(v.entries.map((id) => data.entries[id].method))]
    .sort((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1));

  // What is drawn upwards, and of which weights.
  const METRICS = {
    top1: { key: "top1", name: "top-1 accuracy", title: "top-1 accuracy (%)", head: "Accuracy", same: null, percent: true },
    agreement: { key: "agreement", name: "agreement with dense", title: "same answer as the dense model (%)", head: "Agreement with dense", same: 100, percent: true },
    cosine: { key: "cosine", name: "feature cosine to dense", title: "cosine of the features with dense", head: "Features like dense", same: 1, percent: false },
  };
  for (const one of data.metrics) METRICS[one.key] = one;
  const metric = () => METRICS[$("metric").value] ?? METRICS[view.metric];
  function height(e) {
    const { key, same } = metric(); // the dense model is like itself
    return same !== null && e.id === view.reference ? same : e.scores[key] ?? null;
  }
  const ends = (e) => e.ends[metric().key] ?? null;
  const WEIGHTS = { all: () => true, untrained: (e) => !e.trained, trained: (e) => e.trained || e.dense };
  const chosen = (e) => WEIGHTS[$("weights").value](e);
  // Every word has to be found somewhere in what is known of an entry.
  const wanted = () => $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = (text) => wanted().every((word) => text.includes(word));

  // ------------------------------------------------------------------ plots
  // Texts go into plotly as its own small markup: nothing from a row may be read as a tag.
  const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const hoverText = (e) => e.hover.map((line, i) => (i ? safe(line) : `<b>${safe(line)}</b>`)).join("<br>");
  const font = () => getComputedStyle(document.body).fontFamily;

  const plots = [
    {
      node: $("plot-gmacs"), empty: $("empty-gmacs"), why: (v) => v.empty.gmacs,
      x: (e) => e.gmacs, better: -1, title: "GMACs per image", words: "GMACs",
    },
    {
      node: $("plot-speed"), empty: $("empty-speed"), why: (v) => v.empty.speed,
      x: (e) => e.speeds[$("setting").value]?.rate ?? null,
      better: 1, title: "images per second", words: "throughput",
    },
  ];

  function range(values, low = 0.07, high = 0.07) {
    const min = Math.min(...values), max = Math.max(...values);
    const span = max - min || Math.abs(max) * 0.2 || 1;
    return [min - low * span, max + high * span];
  }

  // Those that no other beats: at least as cheap and as good, and better in one of the two.
  function frontOf(entries, plot) {
    const beats = (a, b) => {
      const cheaper = plot.better * (plot.x(a) - plot.x(b)), better = height(a) - height(b);
      return cheaper >= 0 && better >= 0 && cheaper + better > 0;
    };
    return entries.filter((b) => !entries.some((a) => beats(a, b))).sort((a, b) => plot.x(a) - plot.x(b));
  }

  function draw(plot) {
    const known = view.entries.map((id) => data.entries[id]).filter((e) => chosen(e) && height(e) !== null && plot.x(e) !== null);
    const reason = known.length ? null : plot.why(view) || "Nothing to plot for this selection.";
    plot.node.hidden = Boolean(reason);
    plot.empty.hidden = !reason;
    plot.empty.textContent = reason || "";
    if (reason) {
      Plotly.purge(plot.node); // takes the listeners along
      plot.listening = false;
      return;
    }

    const ink = css("--ink"), muted = css("--muted"), card = css("--card");
    const front = frontOf(known, plot);
    const onFront = new Set(front.map((e) => e.id));
    const untrained = known.some((e) => e.trained) && $("weights").value === "all" ? frontOf(known.filter((e) => !e.trained), plot) : [];
    plot.front = onFront;
    const shown = known.filter((e) => !hidden.has(e.method) && (e.dense || found(e.search)));
    const traces = [{
      x: front.map(plot.x), y: front.map(height), mode: "lines", hoverinfo: "skip",
      line: { color: css("--front"), width: 9 }, opacity: 0.5,
    }, {
      x: untrained.map(plot.x), y: untrained.map(height), mode: "lines", hoverinfo: "skip",
      line: { color: css("--front"), width: 2.5, dash: "dash" },
    }];
    const curves = new Map();
    for (const e of shown) {
      const key = e.dense && !e.control ? "dense" : JSON.stringify([e.method, e.backbone, e.trained]);
      if (!curves.has(key)) curves.set(key, []);
      curves.get(key).push(e);
    }
    // The front's curves last, on top of those that they beat.
    const level = (curve) => curve.some((e) => onFront.has(e.id)) ? 1 : 0;
    for (const curve of [...curves.values()].sort((a, b) => level(a) - level(b))) {
      curve.sort((a, b) => plot.x(a) - plot.x(b));
      const first = curve[0];
      const trace = {
        x: curve.map(plot.x), y: curve.map(height), customdata: curve.map((e) => e.id),
        meta: first.method, text: curve.map(hoverText), hovertemplate: "%{text}<extra></extra>", mode: "lines+markers",
        line: { color: color(first.method), width: first.control ? 1.6 : first.dense ? 1 : 1.2, dash: first.control ? "dot" : first.dense ? "dash" : "solid" },
        marker: {
          color: color(first.method), opacity: 1, size: curve.map((e) => (e.dense ? 11 : SIZES[shape(e.method)] ?? 11)),
          symbol: curve.map(symbol),
          line: {
            color: curve.map((e) => (onFront.has(e.id) ? ink : e.control ? color(e.method) : card)),
            width: curve.map((e) => (e.control ? 2.2 : onFront.has(e.id) ? 1.6 : 1)),
          },
        },
        hoverlabel: { bordercolor: color(first.method) },
      };
      // Hollow: filled with the ground, so that lines do not show through.
      if (first.control) trace.marker.color = card;
      trace.line.color = fade(trace.line.color, first.control ? 0.8 : curves.size > 16 ? 0.2 : 0.45);
      if ($("bars").checked && curve.some((e) => e.range)) {
        trace.error_x = plot.words !== "GMACs" ? undefined : {
          type: "data", symmetric: false, thickness: 1, width: 3, color: fade(color(first.method), 0.55),
          array: curve.map((e) => (e.range ? e.range[1] - e.gmacs : 0)), arrayminus: curve.map((e) => (e.range ? e.gmacs - e.range[0] : 0)),
        };
      }
      if ($("bars").checked && curve.some(ends)) {
        trace.error_y = {
          type: "data", symmetric: false, thickness: 1, width: 3, color: fade(color(first.method), 0.55),
          array: curve.map((e) => (ends(e)?.[1] ?? height(e)) - height(e)), arrayminus: curve.map((e) => height(e) - (ends(e)?.[0] ?? height(e))),
        };
      }
      traces.push(trace);
      const trained = curve.filter((e) => e.trained && !e.dense);
      if (trained.length) traces.push({ // pierced
        x: trained.map(plot.x), y: trained.map(height), meta: first.method, mode: "markers", hoverinfo: "skip", marker: { color: card, size: 4 },
      });
    }

    const reference = data.entries[view.reference];
    const shapes = [];
    let heights = known.map(height), below = 0;
    if ($("near").checked) {
      const best = Math.max(...heights), far = metric().percent ? 10 : 0.1;
      below = heights.filter((y) => y < best - far).length;
      heights = heights.filter((y) => y >= best - far);
    }
    if (reference && height(reference) !== null) {
      const across = { xref: "paper", x0: 0, x1: 1 };
      if (ends(reference)) {
        shapes.push({ type: "rect", ...across, y0: ends(reference)[0], y1: ends(reference)[1], fillcolor: css("--band"), line: { width: 0 }, layer: "below" });
      }
      shapes.push({ type: "line", ...across, y0: height(reference), y1: height(reference), line: { color: ink, width: 1.2, dash: "dash" }, layer: "below" });
      const x = plot.x(reference);
      if (x !== null) shapes.push({ type: "line", yref: "paper", y0: 0, y1: 1, x0: x, x1: x, line: { color: muted, width: 1, dash: "dot" }, layer: "below" });
    }
    const axis = {
      gridcolor: css("--grid"), zeroline: false, linecolor: css("--line"), tickcolor: css("--line"), showline: true,
      ticks: "outside", ticklen: 4, tickfont: { size: 12, color: muted }, automargin: false,
    };
    const narrow = plot.node.clientWidth < 460;
    const layout = {
      margin: { l: 56, r: 12, t: 34, b: 50 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: font(), color: ink, size: 13 }, showlegend: false, hovermode: "closest", shapes, annotations: [],
      dragmode: narrow ? false : "zoom",
      xaxis: { ...axis, range: range(known.map(plot.x)), nticks: narrow ? 5 : 9, title: { text: plot.title, font: { size: 13 }, standoff: 8 } },
      yaxis: { ...axis, range: range(heights, 0.07, 0.12), title: { text: metric().title, font: { size: 13 }, standoff: 8 } },
      hoverlabel: { align: "left", bgcolor: card, font: { family: font(), color: ink, size: 12.5 } },
    };
    const config = {
      responsive: false, displaylogo: false, scrollZoom: false,
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], displayModeBar: narrow ? false : "hover",
    };
    plot.below = below ? [{
      xref: "paper", yref: "paper", x: 1, y: 0, xanchor: "right", yanchor: "bottom", showarrow: false, captureevents: false,
      text: `${below} more below`, font: { size: 12, color: muted }, bgcolor: fade(card, 0.8),
    }] : [];
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: ink };
    Plotly.react(plot.node, traces, layout, config).then(() => {
      label(plot, shown, onFront);
      if (plot.listening) return;
      plot.listening = true;
      plot.node.on("plotly_relayout", (change) => { if (!("annotations" in change)) label(plot, ...plot.last); });
      plot.node.on("plotly_hover", (event) => showPicture(event.points[0].customdata ?? null));
      plot.node.on("plotly_unhover", () => showPicture(null));
      plot.node.on("plotly_click", (event) => reveal(event.points[0].customdata));
    });
  }

  // So that all shapes look equally large.
  const SIZES = { circle: 10.5, "triangle-up": 11.5, "triangle-down": 11.5, star: 14, hexagram: 13 };
  function symbol(e) {
    if (e.control) return e.trained ? "diamond" : e.guest ? "triangle-up" : "square";
    return shape(e.method);
  }

  // Among many curves a chip under the pointer shows which curve is its own.
  function spotlight(method) {
    for (const { node } of plots) {
      if (node.hidden || !node.data) continue;
      const opacity = node.data.map((t) => (t.meta === undefined ? 0.5 : method === null || t.meta === method ? 1 : 0.1));
      Plotly.restyle(node, { opacity });
    }
  }

  function fade(hex, alpha) {
    const part = (i) => parseInt(hex.slice(i, i + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${alpha})`;
  }

  // Labels for the front and the dense model, each where it covers neither a point nor a label.
  const pen = document.createElement("canvas").getContext("2d");
  function label(plot, shown, onFront) {
    plot.last = [shown, onFront];
    const { xaxis, yaxis } = plot.node._fullLayout;
    const at = (e) => [xaxis.l2p(plot.x(e)), yaxis.l2p(height(e))];
    const taken = shown.map((e) => at(e)).map(([x, y]) => [x - 7, y - 7, x + 7, y + 7]);
    const reference = data.entries[view.reference];
    if (reference && height(reference) !== null) {
      const y = yaxis.l2p(height(reference));
      taken.push([0, y - 3, xaxis._length, y + 3]);
    }
    pen.font = `600 12px ${font()}`;
    const annotations = [];
    const named = shown.filter((s) => onFront.has(s.id) || s.dense);
    for (const e of named.sort((a, b) => onFront.has(b.id) - onFront.has(a.id))) {
      const text = view.combined && e.dense && !e.control ? e.backbone : e.short, width = pen.measureText(text).width + 4, tall = 16;
      const [x, y] = at(e);
      const places = [[-8, -12, 1], [8, -12, 0], [0, -19, 0.5], [12, 0, 0], [-12, 0, 1], [8, 12, 0], [-8, 12, 1], [0, 19, 0.5], [-4, -21, 1], [4, -21, 0]];
      for (const [dx, dy, anchor] of places) {
        const left = x + dx - anchor * width, top = y + dy - tall / 2;
        const box = [left, top, left + width, top + tall];
        const inside = box[0] >= 0 && box[1] >= 0 && box[2] <= xaxis._length && box[3] <= yaxis._length;
        if (!inside || taken.some((t) => box[0] < t[2] && t[0] < box[2] && box[1] < t[3] && t[1] < box[3])) continue;
        taken.push(box);
        annotations.push({
          x: plot.x(e), y: height(e), text: safe(text), showarrow: false, xshift: dx, yshift: -dy, borderpad: 0,
          xanchor: ["left", "center", "right"][anchor * 2], yanchor: "middle", font: { size: 12, weight: 600 },
          bgcolor: fade(css("--card"), 0.72), captureevents: false,
        });
        break;
      }
    }
    Plotly.relayout(plot.node, { annotations: [...annotations, ...plot.below] });
  }

  // ---------------------------------------------------------------- filters
  function fill(select, options, value) {
    select.replaceChildren(...options.map(([v, text]) => make("option", { value: v, textContent: text })));
    if (options.some(([v]) => v === value)) select.value = value;
  }

  function showView() {
    view = data.views[Number($("view").value)];
    fill($("setting"), Object.keys(view.speed).map((name) => [name, name]), $("setting").value);
    $("setting-field").hidden = Object.keys(view.speed).length < 2;
    const members = view.entries.map((id) => data.entries[id]);
    $("against-field").hidden = !members.some((e) => Object.values(e.speeds).some((s) => s.timm));
    if ($("against-field").hidden) $("against").value = "dense";
    const measured = Object.keys(METRICS).filter((name) => members.some((e) => (e.scores[name] ?? null) !== null));
    // The one that the view goes by first, unless another was chosen.
    measured.sort((a, b) => (b === view.metric) - (a === view.metric));
    fill($("metric"), measured.map((name) => [name, METRICS[name].name]), $("metric").value);
    $("metric-field").hidden = measured.length < 2;
    $("weights-field").hidden = !members.some((e) => e.trained);
    if ($("weights-field").hidden) $("weights").value = "all";
    $("trained-key").hidden = $("weights-field").hidden;
    $("runs-key").hidden = !members.some((e) => e.runs);
    $("control-key").hidden = !members.some((e) => e.control);
    const main = (e) => e.scores[view.metric] ?? null;
    const best = Math.max(...members.map((e) => main(e) ?? -1)), far = METRICS[view.metric].percent ? 10 : 0.1;
    $("near-field").hidden = !members.some((e) => main(e) !== null && main(e) < best - far);
    // A few bad results must not squeeze all others into one line.
    $("near").checked = !$("near-field").hidden;
    const reference = data.entries[view.reference];
    $("bars-field").hidden = !members.some((e) => Object.keys(e.ends).length);
    $("band-key").hidden = !reference || !Object.keys(reference.ends).length;
    $("notes").replaceChildren(...view.notes.map((note) => make("li", { textContent: note })));
    $("notes").hidden = !view.notes.length;
    makeChips();
    showMethods();
  }

  const reset = make("button", { type: "button", className: "chip text", textContent: "show all" });
  reset.addEventListener("click", () => only("*"));

  function makeChips() {
    $("chips").replaceChildren(...methodsOf(view).map((m) => {
      const chip = make("button", { type: "button", value: m, className: "chip", title: "click: hide or show; double click: only this" },
        make("i", { className: rank(m) === 1 ? "square hollow" : shape(m) }), make("span", { textContent: m === data.dense ? "dense" : m }));
      chip.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") spotlight(m); });
      chip.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") spotlight(null); });
      chip.addEventListener("click", (event) => {
        if (event.detail > 1) { only(m); return; }
        if (!hidden.delete(m)) hidden.add(m);
        showMethods();
      });
      return chip;
    }), reset);
  }

  function showMethods() {
    const methods = methodsOf(view);
    const on = methods.filter((m) => !hidden.has(m));
    const reducers = methods.filter((m) => rank(m) === 2);
    const lit = reducers.filter((m) => !hidden.has(m));
    const options = [["*", "all methods"], ...reducers.map((m) => [m, m])];
    const one = lit.length === 1 && reducers.length > 1 ? lit[0] : null;
    const some = lit.length < reducers.length && !one;
    if (some) options.unshift(["?", "some methods"]);
    fill($("method"), options, one || (some ? "?" : "*"));
    for (const chip of $("chips").children) {
      if (chip === reset) continue;
      chip.setAttribute("aria-pressed", String(!hidden.has(chip.value)));
      chip.style.setProperty("--dot", color(chip.value));
    }
    reset.hidden = on.length === methods.length;
    redraw();
    filterTable();
  }

  function only(method) {
    hidden.clear();
    if (method !== "*") for (const e of all) if (e.method !== method && !e.dense) hidden.add(e.method);
    showMethods();
  }

  function redraw() {
    const setting = $("setting").value;
    $("speed-sub").textContent = `${setting ? `on ${setting}; ` : ""}further up and right is better`;
    $("tiles").replaceChildren(...view.tiles[setting].map(([name, value, text]) => make("div", { className: "tile" },
      make("h3", { textContent: name }), make("strong", { textContent: value }), make("p", { textContent: text }))));
    for (const plot of plots) $(`title-${plot.node.id.slice(5)}`).textContent = `${metric().head} against ${plot.words}`;
    $("untrained-key").hidden = $("weights").value !== "all" || !view.entries.some((id) => data.entries[id].trained);
    plots.forEach(draw);
  }

  // ------------------------------------------------------------------ table
  const body = $("results").tBodies[0];
  const records = [...body.rows];

  function closeDetails() {
    body.querySelectorAll("tr.detail").forEach((row) => row.remove());
    body.querySelectorAll("[aria-expanded]").forEach((b) => b.setAttribute("aria-expanded", "false"));
  }

  function filterTable() {
    closeDetails();
    const everything = $("everything").checked;
    const inView = new Set(view.entries);
    $("results").classList.toggle("single", !everything && !view.combined);
    const setting = $("setting").value;
    const one = $("weights").value === "untrained" ? (v) => v.front_untrained : (v) => v.front;
    const front = new Set(everything ? data.views.filter((v) => !v.combined).flatMap(one) : one(view));
    const failures = new Set(everything ? data.views.flatMap((v) => v.failures) : view.failures);
    let shown = 0;
    for (const row of records) {
      if (row.classList.contains("failure")) {
        const listed = failures.has(Number(row.dataset.row)) && failureShown(row.dataset.method);
        row.hidden = !listed || !found(row.textContent.toLowerCase());
        continue;
      }
      const entry = data.entries[row.dataset.entry], old = row.classList.contains("old");
      const elsewhere = everything ? entry.guest : old || !inView.has(entry.id);
      row.hidden = hidden.has(entry.method) || !chosen(entry) || elsewhere || !found(entry.search);
      shown += !row.hidden;
      row.classList.toggle("pareto", !old && front.has(entry.id));
      if (old) continue;
      const speed = entry.speeds[setting] ?? (everything ? Object.values(entry.speeds)[0] : null) ?? null;
      cell(row.querySelector(".rate"), speed?.rate, speed?.text);
      const gain = over(speed);
      cell(row.querySelector(".up"), gain?.up, gain?.uptext);
      cell(row.querySelector(".efficiency"), gain?.efficiency, gain?.efftext);
      cell(row.querySelector(".memory"), speed?.memory, speed?.memtext);
    }
    showEngines(records.filter((row) => !row.hidden && !row.matches(".failure, .old")).map((row) => data.entries[row.dataset.entry]));
    hideEmptyColumns();
    const runs = records.filter((row) => !row.matches(".failure, .guest")).length;
    const without = records.filter((row) => row.classList.contains("failure") && failures.has(Number(row.dataset.row)));
    const skipped = without.filter((row) => row.dataset.status === "skipped").length;
    const counted = [[without.length - skipped, "failed"], [skipped, "skipped"]].filter(([count]) => count);
    const lost = counted.map(([count, word]) => ` and ${count} ${word}`).join("");
    $("count").textContent = `${shown} of ${Math.max(runs, shown)}${lost}; click ▸ for the whole row`;
    $("everything-field").hidden = runs === view.entries.length;
  }

  // What a speed-up is over: the dense model run alike, or the library's own.
  const over = (speed) => ($("against").value === "timm" ? speed?.timm : speed) ?? null;

  // One column per setting, where there are several: what the arithmetic promises, and what is kept of it.
  function showEngines(entries) {
    const settings = Object.keys(view.speed).filter((name) => entries.some((e) => over(e.speeds[name])?.efftext));
    const rows = entries.filter((e) => settings.some((name) => over(e.speeds[name])?.efftext));
    $("engines").hidden = settings.length < 2;
    if ($("engines").hidden) return;
    $("engines-sub").textContent = `speed-up over what the GMACs promise, and in small the speed-up, over ${$("against").selectedOptions[0].textContent}`;
    const table = $("engines").querySelector("table");
    const head = (text, word) => make("th", { scope: "col", className: word ? "word" : "", textContent: text });
    table.tHead.replaceChildren(make("tr", {}, head("Method", true), ...settings.map((name) => head(name))));
    table.tBodies[0].replaceChildren(...rows.map((e) => make("tr", {}, make("td", { className: "word", textContent: e.name }),
      ...settings.map((name) => {
        const gain = over(e.speeds[name]);
        return gain?.efftext ? make("td", {}, gain.efftext, make("small", { textContent: gain.uptext })) : make("td");
      }))));
  }

  // A failed run belongs to the chips of its method; the arguments in their names are not known.
  function failureShown(method) {
    const name = method === "dense" ? data.dense : method;
    const own = methodsOf(view).filter((m) => m === name || m.startsWith(`${name} `));
    return own.length ? own.some((m) => !hidden.has(m)) : !methodsOf(view).some((m) => hidden.has(m));
  }

  function hideEmptyColumns() {
    const failed = records.filter((row) => row.classList.contains("failure"));
    const full = records.filter((row) => !row.classList.contains("failure"));
    const visible = full.filter((row) => !row.hidden);
    let filled = 0;
    [...$("results").tHead.rows[0].cells].forEach((head, index) => {
      const empty = index > 0 && visible.every((row) => !row.cells[index].textContent);
      for (const row of [head.parentNode, ...full]) row.cells[index].hidden = empty;
      filled += !empty && index >= 4;
    });
    for (const row of failed) row.querySelector(".error").colSpan = Math.max(1, filled);
  }

  function cell(node, value, text) {
    node.textContent = text ?? "";
    if (value === null || value === undefined) delete node.dataset.v; else node.dataset.v = value;
  }

  function sortBy(head) {
    closeDetails();
    const index = [...head.parentNode.cells].indexOf(head), word = head.classList.contains("word");
    const before = head.getAttribute("aria-sort");
    const up = before ? before === "descending" : word;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => {
      const c = row.cells[index];
      if (!c || c.classList.contains("error")) return null;
      return word ? c.textContent.trim().toLowerCase() || null : c.dataset.v === undefined ? null : Number(c.dataset.v);
    };
    records.sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === null || y === null) return (x === null) - (y === null); // unknown always last
      const order = word ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
      return up ? order : -order;
    });
    body.append(...records);
  }

  function toggleDetail(row) {
    const button = row.querySelector("button"), open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open));
    if (open) { row.nextElementSibling.remove(); return; }
    const list = make("dl");
    const picture = row.classList.contains("old") ? null : data.entries[row.dataset.entry]?.picture;
    if (picture) list.append(make("div", { className: "wide" }, make("dt", { textContent: "picture" }), make("dd", {}, seen(picture))));
    const { runs } = row.classList.contains("old") ? {} : data.entries[row.dataset.entry] ?? {};
    if (runs) list.append(make("div", { className: "wide" }, make("dt", { textContent: "runs" }), make("dd", { textContent: `${runs}; what follows is the latest of them` })));
    for (const [name, value, meaning] of data.rows[row.dataset.row]) {
      const pair = make("div", { className: value.length > 60 ? "wide" : "", title: meaning }, make("dt", { textContent: name }), make("dd", { textContent: value }));
      list.append(pair);
    }
    const holder = make("td", { colSpan: row.cells.length }, list);
    row.after(make("tr", { className: "detail" }, holder));
  }

  // What became of the patches of an image, where a run drew it.
  function seen(picture) {
    return make("img", { src: picture.src, alt: "what is kept, merged and dropped of an image", title: picture.page });
  }

  function showPicture(id) {
    const picture = id === null ? null : data.entries[id]?.picture;
    $("picture").hidden = !picture;
    if (picture) $("picture").replaceChildren(seen(picture), make("p", { textContent: data.entries[id].hover[0] }));
  }

  function reveal(id) {
    const row = records.find((r) => Number(r.dataset.entry) === id && !r.classList.contains("old"));
    if (!row) return;
    row.scrollIntoView({ block: "center", behavior: "smooth" });
    row.classList.add("flash");
    setTimeout(() => row.classList.remove("flash"), 2500);
  }

  // ------------------------------------------------------------ published numbers
  const KINDS = {
    none: ["circle-open", "#2563d9", "#6ea3ff"], light: ["diamond-open", "#1f8f4d", "#56d08a"], tuned: ["triangle-up-open", "#d9630b", "#ff9c4a"],
    dense: ["square-open", "#1c2430", "#e8ecf2"], other: ["star-open", "#8b3fd6", "#bd93ff"],
  };
  const published = data.published.length > 0;
  const hiddenKinds = new Set();

  function drawPublished() {
    const node = $("plot-published"), chosen = $("published-backbone").value, shade = (k) => KINDS[k][dark.matches ? 2 : 1];
    const own = data.imagenet.map((id) => data.entries[id]);
    const traces = [];
    for (const kind of Object.keys(data.trainings)) {
      // Small fast models stand beside every backbone: they are what is taken instead.
      const some = data.published.filter((p) => p.training === kind && !hiddenKinds.has(kind) && (!chosen || kind === "other" || p.backbone === chosen));
      if (!some.length) continue;
      const far = (p, sign) => (p.theirs === null || p.ours === null || sign * (p.theirs - p.ours) <= 0 ? null : sign * (p.theirs - p.ours));
      traces.push({
        x: some.map((p) => p.gmacs), y: some.map((p) => p.top1), mode: "markers", meta: kind, text: some.map((p) => p.method),
        hovertext: some.map((p) => p.hover.map((line, i) => (i ? safe(line) : `<b>${safe(line)}</b>`)).join("<br>")), hovertemplate: "%{hovertext}<extra></extra>",
        marker: { symbol: KINDS[kind][0], size: kind === "other" ? 12 : 9.5, color: shade(kind), line: { width: 1.7, color: shade(kind) } },
        error_x: { type: "data", symmetric: false, thickness: 1, width: 0, color: fade(shade(kind), 0.55), array: some.map((p) => far(p, 1)), arrayminus: some.map((p) => far(p, -1)) },
        error_y: kind !== "other" ? undefined : { type: "data", symmetric: false, thickness: 1, width: 3, color: fade(shade(kind), 0.55), array: some.map((p) => Math.max(...p.ends) - p.top1 || null), arrayminus: some.map((p) => p.top1 - Math.min(...p.ends) || null) },
        hoverlabel: { bordercolor: shade(kind) },
      });
    }
    const run = own.filter((e) => !chosen || e.backbone.startsWith(chosen));
    if (run.length) traces.push({
      x: run.map((e) => e.gmacs), y: run.map((e) => e.scores.top1), mode: "markers", text: run.map(hoverText), hovertemplate: "%{text}<extra></extra>",
      marker: { size: 11, color: run.map((e) => color(e.method)), symbol: run.map(symbol) },
    });
    const ink = css("--ink"), axis = { gridcolor: css("--grid"), zeroline: false, linecolor: css("--line"), showline: true, tickfont: { size: 12, color: css("--muted") } };
    const ticks = [0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150];
    Plotly.react(node, traces, {
      margin: { l: 56, r: 12, t: 18, b: 50 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
      font: { family: font(), color: ink, size: 13 }, dragmode: node.clientWidth < 460 ? false : "zoom",
      xaxis: { ...axis, type: "log", tickvals: ticks, ticktext: ticks.map(String), title: { text: "GMACs per image", standoff: 8 } },
      yaxis: { ...axis, title: { text: "top-1 accuracy (%)", standoff: 8 } },
      hoverlabel: { align: "left", bgcolor: css("--card"), font: { family: font(), color: ink, size: 12.5 } },
    }, { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] })
      .then(() => namePublished(node));
  }

  // Names where there is room for them, the best first; all others show when pointed at.
  function namePublished(node) {
    const { xaxis, yaxis } = node._fullLayout, points = [];
    for (const t of node.data) if (t.meta !== undefined) t.x.forEach((x, i) => points.push({ x: Math.log10(x), y: t.y[i], text: t.text[i], px: xaxis.l2p(Math.log10(x)), py: yaxis.l2p(t.y[i]) }));
    const taken = points.map((p) => [p.px - 6, p.py - 6, p.px + 6, p.py + 6]), annotations = [];
    pen.font = `11px ${font()}`;
    for (const p of points.sort((a, b) => b.y - a.y)) {
      const half = pen.measureText(p.text).width / 2 + 3, box = [p.px - half, p.py - 23, p.px + half, p.py - 8];
      if (box[0] < 0 || box[2] > xaxis._length || box[1] < 0 || taken.some((t) => box[0] < t[2] && t[0] < box[2] && box[1] < t[3] && t[1] < box[3])) continue;
      taken.push(box);
      annotations.push({ x: p.x, y: p.y, text: safe(p.text), showarrow: false, yshift: 15, font: { size: 11, color: css("--muted") }, captureevents: false });
    }
    Plotly.relayout(node, { annotations });
  }

  function keysPublished() {
    const used = new Set(data.published.map((p) => p.training));
    $("published-keys").replaceChildren(...Object.entries(data.trainings).filter(([kind]) => used.has(kind)).map(([kind, words]) => {
      const box = make("input", { type: "checkbox", checked: !hiddenKinds.has(kind) });
      box.addEventListener("change", () => { if (box.checked) hiddenKinds.delete(kind); else hiddenKinds.add(kind); drawPublished(); });
      const sign = { circle: "\u25cb", diamond: "\u25c7", "triangle-up": "\u25b3", square: "\u25a1", star: "\u2606" }[KINDS[kind][0].replace("-open", "")];
      const mark = make("b", { textContent: sign });
      mark.style.color = KINDS[kind][dark.matches ? 2 : 1];
      return make("label", { className: "key switch" }, box, mark, words);
    }));
  }

  if (published) {
    const count = new Map();
    for (const p of data.published) if (p.training !== "other") count.set(p.backbone, (count.get(p.backbone) ?? 0) + 1);
    const names = [...count].filter(([, n]) => n > 1).sort((a, b) => b[1] - a[1]);
    fill($("published-backbone"), [["", "all"], ...names.map(([name, n]) => [name, `${name} (${n})`])], "");
    $("published-backbone").addEventListener("change", drawPublished);
    dark.addEventListener("change", () => { keysPublished(); drawPublished(); });
    keysPublished();
    drawPublished();
  }

  body.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) toggleDetail(button.closest("tr"));
  });
  for (const head of $("results").tHead.rows[0].cells) head.firstElementChild.addEventListener("click", () => sortBy(head));
  $("csv").href = URL.createObjectURL(new Blob([data.csv], { type: "text/csv" }));
  $("search").addEventListener("input", () => { redraw(); filterTable(); });
  $("view").addEventListener("change", showView);
  $("method").addEventListener("change", () => { if ($("method").value !== "?") only($("method").value); });
  $("setting").addEventListener("change", () => { redraw(); filterTable(); });
  for (const id of ["everything", "against"]) $(id).addEventListener("change", filterTable);
  for (const id of ["weights", "metric"]) $(id).addEventListener("change", () => { redraw(); filterTable(); });
  for (const id of ["bars", "near"]) $(id).addEventListener("change", redraw);
  dark.addEventListener("change", showMethods);
  let timer = 0, width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return; // a phone's address bar moving
    width = window.innerWidth;
    clearTimeout(timer);
    timer = setTimeout(() => { plots.forEach((p) => { if (!p.node.hidden) Plotly.Plots.resize(p.node); }); redraw(); }, 120);
  });
  showView();
})();
