"""YAML of people one need not trust: read in bounded time and memory, nothing executed, errors of one short line."""

from collections.abc import Hashable
from reprlib import Repr
from typing import Any

import yaml

from .errors import RecipeError

# Of a document; aliases count as what they mean.
MAX_BYTES, MAX_DEPTH, MAX_NODES, MAX_SCALAR = 1 << 18, 16, 20_000, 1000


def parse_yaml(text: bytes, source: str) -> Any:
    """The document as plain data. Raises `RecipeError`, naming the `source`."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # not all are of YAML: 2001-99-99
        raise RecipeError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def yaml_path(*parts: str | int) -> str:
    """`rules[1].key.bits` from its parts."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.lstrip(".")


def shown(value: Any, quotes: bool = True) -> str:
    """A value in an error: at most some 200 characters, whatever it is."""
    try:
        text = _BRIEF.repr(value) if quotes else str(value)
    except ValueError:  # an int of more digits than Python is willing to print
        text = f"an int of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-90:]}"


_BRIEF = Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 120


def _refused(why: str, where: yaml.Event | yaml.Node) -> yaml.YAMLError:
    return yaml.composer.ComposerError(None, None, why, where.start_mark)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML would silently take the last), and what grows without end."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            self._measure(node, 0, {}, set())
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None):  # a recipe needs none, and PyYAML stumbles over wrong ones
            raise _refused(f"tags ({event.tag}) are not allowed", event)
        self.nested = getattr(self, "nested", 0) + 1
        if self.nested > MAX_DEPTH:
            raise _refused(f"more than {MAX_DEPTH} levels deep", event)
        node = super().compose_node(parent, index)
        self.nested -= 1
        return node

    def _measure(self, node: yaml.Node, depth: int, known: dict[int, tuple[int, int]], above: set[int]) -> int:
        """How many nodes `node` means with aliases written out."""
        if depth > MAX_DEPTH or id(node) in above:
            raise _refused(f"more than {MAX_DEPTH} levels deep", node)
        seen, count = known.get(id(node), (-1, 0))
        if seen >= depth:
            return count
        if isinstance(node, yaml.ScalarNode):
            if len(node.value) > MAX_SCALAR:
                raise _refused(f"over {MAX_SCALAR} characters", node)
            return 1
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        count = 1 + sum(self._measure(part, depth + 1, known, above | {id(node)}) for part in parts)
        if count > MAX_NODES:
            raise _refused(f"more than {MAX_NODES} values", node)
        known[id(node)] = depth, count
        return count

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`, whose keys others may override
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _refused("a key is a list or mapping", key_node)
            if key in seen:
                raise _refused(f"key {key!r} is given twice", key_node)
            seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping
