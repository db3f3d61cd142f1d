"""`optimum-cli tqcompress ...` runs the same commands as `tqcompress ...`.

optimum scans the namespace package `optimum.commands.register` for such files; this one stays light and
imports tqcompress only when its command is run.
"""

import sys

from optimum.commands import BaseOptimumCLICommand, CommandInfo


class TQCompressCommand(BaseOptimumCLICommand):
    """Hands everything after `tqcompress` to tqcompress's own command line."""

    COMMAND = CommandInfo(name="tqcompress", help="Compress the KV cache of language models to 1-4 bits a value.")

    @staticmethod
    def parse_args(parser):
        """Leave the arguments to tqcompress."""
        parser.add_argument("arguments", nargs="...", help="as for the tqcompress command; try --help")

    def run(self):
        """Run the command with the words that followed `tqcompress`."""
        from tqcompress.cli import main

        main(sys.argv[2:])


REGISTER_COMMANDS = [TQCompressCommand]
