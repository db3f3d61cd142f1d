"""Does the conformance suite notice a broken cache? Plants one fault at a time in a copy and runs the suite on it.

    python scripts/inject_faults.py [TEXT: only faults that have it in their name]

Each fault is one that users of compressed caches have reported somewhere, or a plausible slip. Prints what noticed it.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What is wrong; the file; the code; what stands there instead.
FAULTS = [
    ("beams do not reorder packed tokens", "cache.py", "            store.map(function)\n", "            pass\n"),
    ("beams do not reorder exact tokens", "cache.py",
     "(tuple(map(function, pair)) for pair in (self.sinks, self.recent))", "(self.sinks, self.recent)"),
    ("beams do not reorder where padded prompts begin", "cache.py", "self.order = function(self.order)", "pass"),
    ("a crop skips the packed tokens", "cache.py", "if left < sinks + packed:", "if False:"),
    ("a crop keeps sinks it should remove", "cache.py",
     "self.sinks = tuple(states[:, :, :left] for states in self.sinks)", "pass"),
    ("a crop leaves one packed token too many", "cache.py", "max(0, left - sinks))\n", "max(0, left - sinks + 1))\n"),
    ("a copied cache shares its packed tokens", "store.py", "    def append(",
     "    def __deepcopy__(self, memo):\n        return self\n\n    def append("),
    ("growing loses the last token", "store.py", "used = -(-self.length // field.tokens)",
     "used = max(0, self.length // field.tokens - 1)"),
    ("the window is released a token early", "cache.py", "keep=self.codecs.window + min(count, DRAFT_ROOM)",
     "keep=self.codecs.window - 1 + min(count, DRAFT_ROOM)"),
    ("drafts are encoded at once", "cache.py", "keep=self.codecs.window + min(count, DRAFT_ROOM)",
     "keep=self.codecs.window"),
    ("padding is taken for sinks", "cache.py", "if empty and self.padding is not None", "if False"),
    ("masks are not put into the order stored", "masks.py", "    if order is None:\n        return mask\n",
     "    return mask\n"),
    ("a mask of four axes is taken for causal", "masks.py", "return mask if visible is None else visible",
     "return mask[:, 0, -1] if visible is None else visible"),
    ("the last of several tokens sees only itself hidden", "blockwise.py",
     "if stop - 1 <= self.first_query:", "if start <= self.first_query:"),
    ("reset keeps where padded prompts began", "cache.py", "self.padding = self.order = None\n\n    def reorder",
     "pass\n\n    def reorder"),
    ("soft caps are ignored", "blockwise.py", "if self.softcap is not None:", "if False:"),
    ("attention sinks are ignored", "attention.py", "if s_aux is not None:", "if False:"),
    ("one head's codes are another's", "view.py", "return states.narrow(1, first, count) if neighbours",
     "return states.narrow(1, 0, count) if neighbours"),
    ("keys and values of a prefill are rounded", "cache.py", "returned = (key_states, value_states) if empty",
     "returned = (key_states.bfloat16().to(key_states.dtype), value_states) if empty"),
]  # fmt: skip


def run(fault: tuple[str, str, str, str]) -> str | None:
    """The first test that fails with the fault, or None."""
    _, name, code, instead = fault
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("tqcompress", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / part, copy)
        path = copy / "tqcompress" / name
        text = path.read_text(encoding="utf-8")
        if text.count(code) != 1:
            raise SystemExit(f"{fault[0]}: the code is {text.count(code)} times in {name}")
        path.write_text(text.replace(code, instead), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
        files = [f"tests/conformance/test_{part}.py" for part in ("operations", "generation", "modes")]
        done = subprocess.run([*command, *files], cwd=copy, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0].rpartition("::")[2] if failed else None


def main() -> None:
    """Run all faults; fails if one goes unnoticed."""
    missed, only = 0, " ".join(sys.argv[1:])
    faults = [fault for fault in FAULTS if only in fault[0]]
    for fault in faults:
        noticed = run(fault)
        missed += noticed is None
        print(f"{fault[0]}: {noticed or 'NOT NOTICED'}", flush=True)
    print(f"{len(faults)} faults, {missed} not noticed")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
