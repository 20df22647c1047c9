"""One number for each class in all splits, and the same one that the weights have for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from zoo.data.classes import (
    check_table,
    differing,
    imagenet_names,
    names_of_table,
    shortened,
    trained_names,
)
from zoo.data.loader import note
from zoo.data.source import FolderOptions, Source, count_classes, folder_names, is_folder
from zoo.errors import ZooError


class Numbering:
    """The classes of a data set, by their names.

    Weights that know the names of their outputs decide about the numbers; else a class map; else
    the folders of the training split; else what the data says.

    Args:
        label: Name of the data, for messages.
        name: The same as `data.name` has it.
        root: Folder of the data.
        splits: Training split and tested split, in the data's own words.
        folder: How image folders are read.
        first: Returns a part of the data, to ask for its classes.
        match_names: False goes by the numbers, whatever the weights know.
    """

    def __init__(
        self,
        label: str,
        name: str,
        root: str | None,
        splits: Sequence[str],
        folder: FolderOptions,
        first: Callable[[], Source],
        match_names: bool = True,
    ) -> None:
        self.label, self.name, self.root, self.splits = label, name, root, splits
        self.folder, self.first, self.match_names = folder, first, match_names
        self.is_folder = is_folder(name)
        self.trained: list[str] | None = None  # what the weights know

    @property
    def names(self) -> list[str] | None:
        """The classes in the order of their numbers, or None."""
        return self._own() if self.trained is None else self.trained

    @property
    def order(self) -> str | None:
        """What gave class folders their numbers: the sorting rule, `class_map` or `weights`."""
        if not self.is_folder:
            return None
        if self.folder.class_map is not None:
            return "class_map"
        return self.folder.rule(self.name) if self.trained is None else "weights"

    @property
    def count(self) -> int | None:
        """How many classes there are, or None."""
        table = self._table()
        if table is not None:
            return max(table.values()) + 1
        names = self.names
        return count_classes(self.first()) if names is None else len(names)

    def follow(self, model: nn.Module, training: bool = False) -> None:
        """Number the classes as a model's weights do, where those know any of them.

        Args:
            model: A timm model or a wrapped one.
            training: Whether it may learn other classes than it knows.

        Raises:
            ZooError: A class map contradicts the weights.
        """
        self.trained = None
        known = trained_names(model) if self.match_names else None
        table = self._table()
        if table is not None and known is not None and not training:
            check_table(table, known, self.label)
        own = self._own() if table is None and self.match_names else None
        if own is None:
            return
        if known is None:
            self.trained = None if training else imagenet_names(model, own)
        elif training and set(own) != set(known):
            note(
                f"{self.label} has other classes than the weights know, they differ in "
                f"{differing(own, known)}; output i is trained for the data's class i"
            )
        else:
            self.trained = known

    def numbers(self, data: Source, first: Source) -> list[int] | None:
        """Return the number of each class of a part; None where it is the part's own.

        Args:
            data: The part.
            first: The part that was opened first, whose numbers hold where there are no folders.

        Raises:
            ZooError: It has a class that the weights, or the training split, have not.
        """
        if data.names is None or self._table() is not None:
            return None
        names = self.trained or (self._own() if self.is_folder else first.names)
        if names is None or names == data.names:
            return None
        if unknown := sorted(data.used - set(names)):
            raise ZooError(self._unlike(names, unknown, data.names))
        place = {name: i for i, name in enumerate(names)}
        return [place.get(name, -1) for name in data.names]

    def _unlike(self, names: Sequence[str], unknown: Sequence[str], own: Sequence[str]) -> str:
        if self.trained is None:
            return (
                f"{self.label}: training and validation do not have the same classes, they differ "
                f"in {differing(names, own)}"
            )
        remedy = "rename the folders, or give their numbers with data.class_map=FILE; "
        return (
            f"{self.label} has classes that the weights do not know: {shortened(unknown)}; they "
            f"know {shortened(names)}; {remedy if self.is_folder else ''}data.match_names=false "
            "goes by the numbers alone"
        )

    def check_given(self, given: int | None) -> None:
        """Refuse folders for fewer classes than were given: which are missing nobody can tell.

        Raises:
            ZooError: With what to type.
        """
        count = self.count
        if given is None or count is None or count >= given:
            return
        if self.is_folder and self.trained is None and self.folder.class_map is None:
            raise ZooError(
                f"{self.label} has {count} class folders, got data.num_classes={given}: which "
                "classes are missing cannot be told; give data.class_map=FILE with one folder name "
                "a line, in the order of the class numbers"
            )

    def announce(self, data: Source) -> None:
        """Say in one line what of a folder is left out, and which classes have no images."""
        if not (self.is_folder or data.left_out):
            return
        parts = [f"left out {data.left_out}"] if data.left_out else []
        names = self.names or []
        if empty := [name for name in names if name not in data.used]:
            few = shortened(empty, 3)
            parts.append(f"no images of {len(empty)} of {len(names)} classes ({few})")
        if parts:
            note(f"{getattr(data.source, 'tree', self.label)}: {'; '.join(parts)}")

    def _own(self) -> list[str] | None:
        """Names by the data's own numbers: of all splits those of the training split."""
        table = self._table()
        if table is not None:
            return names_of_table(table)
        if not self.is_folder:
            return self.first().names
        return folder_names(self.root, self.splits, self.name, self.folder)

    def _table(self) -> dict[str, int] | None:
        return self.folder.table(str(self.root)) if self.is_folder else None
