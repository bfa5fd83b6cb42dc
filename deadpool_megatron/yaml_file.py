"""One way to read the YAML files that a user writes: what is wrong is said in one line, with its place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yaml import SafeLoader


class NotRead(ValueError):
    """A file cannot be read, or not as YAML. The message is one line without the file's name."""


def read_yaml(path: str) -> Any:
    """What the file says. A key that stands twice in one mapping is refused: the last one would count without a word.

    Raises NotRead.
    """
    import yaml

    try:
        return yaml.load(Path(path).read_text(), _loader())
    except OSError as err:
        raise NotRead(err.strerror or str(err)) from None
    except UnicodeDecodeError:
        raise NotRead("not a text file") from None
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise NotRead(f"not YAML: {line}{err.problem or err.context}") from None
    except yaml.YAMLError as err:
        raise NotRead(f"not YAML: {str(err).splitlines()[0]}") from None


def _loader() -> type[SafeLoader]:
    # Here, since yaml takes time to import and most commands read no file.
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            """Keys are compared here, before those that ``<<`` brings are among them."""
            node = super().compose_mapping_node(anchor)
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                if (key.tag, str(key.value)) in seen:
                    again = f"{key.value!r} stands there for the second time"
                    raise yaml.composer.ComposerError(None, None, again, key.start_mark)
                seen.add((key.tag, str(key.value)))
            return node

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            """What looks like a date and is none raises errors of Python's own, without a place."""
            try:
                return super().construct_object(node, deep)
            except (ValueError, LookupError, AttributeError) as err:
                why = f"{node.value!r} is no {node.tag.rpartition(':')[2]}: {err}"
                raise yaml.constructor.ConstructorError(None, None, why, node.start_mark) from None

    return Loader
