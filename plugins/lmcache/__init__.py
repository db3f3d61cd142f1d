"""LMCache: a serde that packs chunks of the cache where they leave its memory, for disks, object stores and networks.

The engine's own cache stays as it is. Nothing here imports lmcache before `register` is called.
"""

NAME = "tqcompress"  # of "serde": {"type": ...} in LMCache's --l2-adapter


def register() -> None:
    """Make the serde known to LMCache in this process; may be called again."""
    from lmcache.v1.distributed.serde import get_registered_serde_types, register_serde_factory

    from .serde import create

    if NAME not in get_registered_serde_types():
        register_serde_factory(NAME, create)
