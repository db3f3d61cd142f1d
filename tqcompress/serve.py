"""`tqcompress serve`: a compressed model behind the server of `transformers serve`, which speaks OpenAI's protocol."""

import time
from functools import wraps
from pathlib import Path
from typing import Any

import typer
from transformers.cli.serve import Serve
from transformers.utils.import_utils import is_serve_available

from .artifacts import read
from .errors import ModelError, TQCompressError
from .models import loading


class ServeCompressed(Serve):
    """Serve a compressed model with an OpenAI-compatible API, one request after the other.

    FORCE_MODEL is a directory that `tqcompress apply --out` or tqcompress.save wrote; clients ask for the model by
    that name. The server and its options are those of `transformers serve`, but for --continuous-batching.
    """

    @wraps(Serve.__init__)  # type: ignore[misc]  # typer reads the options there
    def __init__(self, force_model: str | None, continuous_batching: bool, **options: Any) -> None:
        if force_model is None:
            raise TQCompressError("name a directory that `tqcompress apply --out` or tqcompress.save wrote")
        if continuous_batching:
            raise TQCompressError(
                "--continuous-batching: transformers keeps the keys and values of batched requests in pages of its "
                "own, which cannot be compressed; without it requests are answered one after the other"
            )
        if not is_serve_available():
            raise TQCompressError("fastapi, uvicorn or openai is missing; install the extra tqcompress[serve]")
        name = str(Path(force_model))
        if "@" in name:  # what stands behind it would be taken for a revision
            raise ModelError(f"{name}: the server cannot name a directory with an @; rename it")
        read(Path(name))  # a bad directory must not wait for the model
        with loading(name):
            super().__init__(force_model=name, **options | {"non_blocking": True})
        entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": ""}
        self._model_manager.get_gen_models = lambda: [entry]  # in place of the models in the hub's cache
        self.server.run()

    def start_server(self) -> None:
        """Nothing yet: the server runs in this thread, so that it gets the signals."""


def serve(words: list[str]) -> None:
    """Run the command with the words that follow `tqcompress serve`, until it is told to stop."""
    app = typer.Typer(add_completion=False)
    app.command()(ServeCompressed)
    app(words, standalone_mode=False, prog_name="tqcompress serve")
