"use strict";
(() => {
  const data = JSON.parse(document.getElementById("payload").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  // Typed arrays in place of what was packed.
  for (const image of data.images) for (const strip of image.strips) {
    strip.means = bytes(strip.means);
    strip.picture = Object.assign(new Image(), { src: strip.photo });
    strip.picture.onload = () => show();
    for (const s of strip.states) {
      s.source = new Int16Array(bytes(s.source).buffer);
      for (const key of ["kept", "heat", "attention"]) if (s[key]) s[key] = bytes(s[key]);
      if (s.percent) s.percent = new Float32Array(bytes(s.percent).buffer);
      s.members = new Map();
      s.source.forEach((slot, i) => { if (slot >= 0) (s.members.get(slot) ?? s.members.set(slot, []).get(slot)).push(i); });
    }
  }

  let image = data.images[0];
  const sides = ["left", "right"].map((id, number) => {
    const node = $(id);
    const side = { node, canvas: node.querySelector("canvas"), select: node.querySelector("select"), words: node.querySelector("figcaption"), number, over: -1 };
    side.strip = () => image.strips[Number(side.select.value) || 0];
    side.state = () => side.strip().states[Math.min(Number($("block").value), side.strip().states.length - 1)];
    return side;
  });

  const attention = () => $("view").value === "attention";
  const alone = (s, i) => (s.kept ? s.kept[i] === 1 : s.source[i] >= 0 && s.members.get(s.source[i]).length === 1);
  const merged = (s, i) => s.source[i] >= 0 && !alone(s, i);

  // Night blue, violet, orange, yellow: as on the sheet.
  const STOPS = [[13, 12, 40], [96, 28, 110], [196, 58, 74], [245, 148, 40], [252, 244, 150]];
  function flame(share) {
    const place = share * 4, low = Math.min(3, Math.floor(place)), part = place - low;
    return STOPS[low].map((v, c) => Math.round(v * (1 - part) + STOPS[low + 1][c] * part));
  }

  // Thin slanted lines, so that what was dropped is no dark part of the photograph.
  let pattern = null, patternOf = 0;
  function hatch(pen, ratio) {
    const size = Math.round(9 * ratio);
    if (patternOf === size) return pattern;
    const tile = make("canvas", { width: size, height: size }), line = tile.getContext("2d");
    line.strokeStyle = "rgba(190,198,212,0.3)";
    line.lineWidth = ratio;
    line.beginPath();
    for (const shift of [-size, 0, size]) { line.moveTo(shift, size); line.lineTo(shift + size, 0); }
    line.stroke();
    patternOf = size;
    return (pattern = pen.createPattern(tile, "repeat"));
  }

  function meanOf(strip, s, slot) {
    const sum = [0, 0, 0], members = s.members.get(slot);
    for (const i of members) for (let c = 0; c < 3; c++) sum[c] += strip.means[3 * i + c];
    return sum.map((v) => Math.round(v / members.length));
  }

  function draw(side) {
    const strip = side.strip(), s = side.state(), [rows, columns] = strip.grid;
    if (!strip.picture.complete) return;
    const room = side.node.clientWidth - 30, ratio = window.devicePixelRatio || 1;
    const tallest = Math.max(260, window.innerHeight - 330);
    const cell = Math.max(2, Math.floor((Math.min(room / columns, tallest / rows)) * ratio));
    const canvas = side.canvas, pen = canvas.getContext("2d");
    canvas.width = columns * cell;
    canvas.height = rows * cell;
    canvas.style.width = `${canvas.width / ratio}px`;
    pen.imageSmoothingEnabled = !strip.sharp;
    pen.imageSmoothingQuality = "high";
    const grey = attention() && s.attention;
    pen.filter = grey ? "grayscale(1)" : "none";
    pen.drawImage(strip.picture, 0, 0, canvas.width, canvas.height);
    pen.filter = "none";
    const box = (i) => [(i % columns) * cell, Math.floor(i / columns) * cell, cell, cell];
    const count = rows * columns;
    if (grey) {
      for (let i = 0; i < count; i++) {
        pen.fillStyle = `rgba(${flame(s.attention[i] / 255)},0.7)`;
        pen.fillRect(...box(i));
      }
    } else if (s.heat) {
      for (let i = 0; i < count; i++) {
        pen.fillStyle = `rgba(16,18,24,${0.92 * (1 - s.heat[i] / 255)})`;
        pen.fillRect(...box(i));
      }
    } else {
      const means = new Map();
      for (let i = 0; i < count; i++) {
        const slot = s.source[i];
        if (merged(s, i)) {
          if (!means.has(slot)) means.set(slot, meanOf(strip, s, slot));
          const color = means.get(slot).map((v, c) => (s.kept ? Math.round(0.55 * v + 0.45 * [16, 18, 24][c]) : v));
          pen.fillStyle = `rgb(${color})`;
          pen.fillRect(...box(i));
        } else if (!alone(s, i)) {
          pen.fillStyle = "rgba(16,18,24,0.86)";
          pen.fillRect(...box(i));
          pen.fillStyle = hatch(pen, ratio);
          pen.fillRect(...box(i));
        }
      }
      outline(pen, s, rows, columns, cell, ratio);
    }
    spotlight(side, pen, s, rows, columns, cell, ratio);
    side.words.replaceChildren(make("b", { textContent: `${s.label}: ` }), s.words, ...(strip.remarks.length ? [make("br"), strip.remarks.join("; ")] : []));
  }

  function edges(rows, columns, apart) {
    const found = [];
    for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
      const i = y * columns + x;
      if (x + 1 < columns && apart(i, i + 1)) found.push([x + 1, y, x + 1, y + 1]);
      if (y + 1 < rows && apart(i, i + columns)) found.push([x, y + 1, x + 1, y + 1]);
    }
    return found;
  }

  function lines(pen, found, cell) {
    pen.beginPath();
    for (const [x0, y0, x1, y1] of found) { pen.moveTo(x0 * cell, y0 * cell); pen.lineTo(x1 * cell, y1 * cell); }
    pen.stroke();
  }

  function outline(pen, s, rows, columns, cell, ratio) {
    pen.strokeStyle = "rgba(250,250,252,0.8)";
    pen.lineWidth = (cell / ratio < 12 ? 1 : 1.6) * ratio;
    lines(pen, edges(rows, columns, (a, b) => s.source[a] !== s.source[b] && (merged(s, a) || merged(s, b))), cell);
  }

  // The token under the pointer, wherever its patches are.
  function spotlight(side, pen, s, rows, columns, cell, ratio) {
    if (side.over < 0 || s.source[side.over] < 0 || s.heat) return;
    const slot = s.source[side.over];
    pen.strokeStyle = "#ffd23f";
    pen.lineWidth = 2.6 * ratio;
    pen.lineCap = "round";
    const inside = (i) => s.source[i] === slot;
    lines(pen, edges(rows, columns, (a, b) => inside(a) !== inside(b)), cell);
    const rim = [];
    for (const i of s.members.get(slot)) {
      const x = i % columns, y = Math.floor(i / columns);
      if (x === 0) rim.push([0, y, 0, y + 1]);
      if (y === 0) rim.push([x, 0, x + 1, 0]);
      if (x === columns - 1) rim.push([columns, y, columns, y + 1]);
      if (y === rows - 1) rim.push([x, rows, x + 1, rows]);
    }
    lines(pen, rim, cell);
  }

  function tell(s, i) {
    if (attention() && s.percent) return `${s.percent[i].toPrecision(2)} % of the class token's attention`;
    if (s.heat) return `share ${(s.heat[i] / 255).toFixed(2)} of the largest`;
    if (s.source[i] < 0) return alone(s, i) ? "kept" : "dropped";
    const members = s.members.get(s.source[i]).length;
    if (s.kept) return s.kept[i] ? (members > 1 ? `kept, stands for ${members} patches` : "kept") : "summed up in another token";
    return members > 1 ? `one token of ${members} patches` : "kept: a token of its own";
  }

  // ------------------------------------------------------------------ the plot
  const SVG = "http://www.w3.org/2000/svg";
  function svg(tag, attributes, text) {
    const node = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function plot() {
    const node = $("curves"), width = node.clientWidth, height = node.clientHeight;
    const shared = new Map(); // those with the same counts share a line
    for (const s of image.strips) {
      const key = s.states.map((t) => t.tokens).join();
      shared.set(key, shared.has(key) ? { ...s, name: `${shared.get(key).name}, ${s.name}` } : s);
    }
    const curves = [...shared.values()], names = curves.map((s) => s.name);
    const room = Math.min(width / 3, 40 + 8 * Math.max(...names.map((n) => n.length)));
    const left = 48, right = width - room, top = 12, bottom = height - 30;
    const most = Math.max(...image.strips.flatMap((s) => s.states.map((t) => t.tokens)));
    const steps = Math.max(...image.strips.map((s) => s.states.length));
    const x = (i) => left + ((right - left) * i) / Math.max(1, steps - 1), y = (v) => bottom - ((bottom - top) * v) / most;
    node.setAttribute("viewBox", `0 0 ${width} ${height}`);
    node.replaceChildren();
    let step = 1;
    for (const next of [2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]) if (step < most / 4) step = next;
    for (let v = 0; v <= most; v += step) {
      node.append(svg("line", { class: "rule", x1: left, x2: right, y1: y(v), y2: y(v) }));
      node.append(svg("text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, v));
    }
    const longest = image.strips.find((s) => s.states.length === steps);
    const every = Math.ceil(steps / Math.max(2, Math.floor((right - left) / 60)));
    for (let i = 0; i < steps; i += every) node.append(svg("text", { x: x(i), y: bottom + 20, "text-anchor": "middle" }, longest.states[i].label.replace("block ", "")));
    const now = Math.min(Number($("block").value), steps - 1);
    node.append(svg("line", { class: "now", x1: x(now), x2: x(now), y1: top, y2: bottom }));
    curves.forEach((strip, k) => {
      const color = data.colors[k % data.colors.length];
      const points = strip.states.map((t, i) => `${x(i).toFixed(1)},${y(t.tokens).toFixed(1)}`);
      node.append(svg("path", { d: `M${points.join("L")}`, stroke: color }));
      strip.states.forEach((t, i) => {
        const dot = svg("circle", { cx: x(i), cy: y(t.tokens), r: i === now ? 5 : 3, fill: color });
        dot.append(svg("title", {}, `${strip.name}, ${t.label}: ${t.tokens} tokens`));
        node.append(dot);
      });
      node.append(svg("line", { x1: right + 14, x2: right + 30, y1: top + 6 + 20 * k, y2: top + 6 + 20 * k, stroke: color, "stroke-width": 3 }));
      node.append(svg("text", { class: "name", x: right + 36, y: top + 10 + 20 * k }, strip.name));
    });
  }

  // ------------------------------------------------------------------ controls
  function show() {
    const state = sides[0].state();
    $("where").textContent = state.label;
    for (const side of sides) if (!side.node.hidden) draw(side);
    $("keys-patches").hidden = attention();
    $("keys-attention").hidden = !attention();
    plot();
  }

  function showImage() {
    image = data.images[Number($("image").value) || 0];
    for (const side of sides) {
      const chosen = side.select.value || String(Math.min(side.number, image.strips.length - 1));
      side.select.replaceChildren(...image.strips.map((s, i) => make("option", { value: i, textContent: s.name })));
      side.select.value = Number(chosen) < image.strips.length ? chosen : "0";
      side.over = -1;
    }
    sides[1].node.hidden = image.strips.length < 2;
    const most = Math.max(...image.strips.map((s) => s.states.length)) - 1;
    const before = $("block").max === String(most) ? $("block").value : most;
    $("block").max = most;
    $("block").value = before;
    $("view-field").hidden = !image.strips.some((s) => s.states.some((t) => t.attention));
    show();
  }

  $("image").replaceChildren(...data.images.map((one, i) => make("option", { value: i, textContent: one.name })));
  $("image-field").hidden = data.images.length < 2;
  $("image").addEventListener("change", showImage);
  $("view").addEventListener("change", show);
  $("block").addEventListener("input", show);
  window.addEventListener("resize", show);

  let timer = null;
  $("play").addEventListener("click", () => {
    const stop = () => { clearInterval(timer); timer = null; $("play").textContent = "\u25b6"; };
    if (timer) return stop();
    if ($("block").value === $("block").max) $("block").value = 0;
    $("play").textContent = "\u23f8";
    show();
    timer = setInterval(() => {
      if ($("block").value === $("block").max) return stop();
      $("block").value = Number($("block").value) + 1;
      show();
    }, 700);
  });

  for (const side of sides) {
    side.select.addEventListener("change", show);
    side.canvas.addEventListener("pointermove", (event) => {
      const place = side.canvas.getBoundingClientRect(), [rows, columns] = side.strip().grid;
      const x = Math.floor(((event.clientX - place.left) / place.width) * columns), y = Math.floor(((event.clientY - place.top) / place.height) * rows);
      if (x < 0 || y < 0 || x >= columns || y >= rows) return;
      const i = y * columns + x, tip = $("tip");
      if (i !== side.over) { side.over = i; draw(side); }
      tip.hidden = false;
      tip.textContent = tell(side.state(), i);
      tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${event.clientY + 16}px`;
    });
    side.canvas.addEventListener("pointerleave", () => { side.over = -1; $("tip").hidden = true; draw(side); });
  }
  showImage();
})();
