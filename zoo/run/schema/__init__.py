"""What the options may be: types and ranges, checked before anything is built.

`kinds` are the types, `options` the table, `check` holds a configuration against it, `sense`
against itself. Nothing here imports torch at module level: a wrong value is answered at once.
"""

from zoo.run.schema.check import check_config

__all__ = ["check_config"]
