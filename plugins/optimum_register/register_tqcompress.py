"""`optimum-cli tqcompress ...` runs the same commands as `tqcompress ...`.

optimum scans the namespace package `optimum.commands.register` for such files; this one stays light and
imports tqcompress only when its command is run.
"""

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class TQCompressCommand(BaseOptimumCLICommand):
    """Hands everything after `tqcompress` to tqcompress's own command line."""

    COMMAND = CommandInfo(name="tqcompress", help="Compress the KV cache of language models to 1-4 bits a value.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Leave the arguments to tqcompress, --help too: to this parser nothing is an option."""
        parser.prefix_chars = ""
        parser.add_argument("arguments", nargs="...", help="as for the tqcompress command")

    def run(self) -> None:
        """Run the command with the words that followed `tqcompress`."""
        from tqcompress.cli import main

        main(self.args.arguments)


REGISTER_COMMANDS = [TQCompressCommand]
