"""scripts/train.py, which also writes down what it reads and compiles; run as a program by the fault tests.

Writes into the folder NOTES (environment) `batches.<process>.jsonl`, {"step", "rows"} with a checksum of each row that
this process read, and at the end `compiled.<process>.json`, the programs that weren't in the cache.
"""

import json
import os
import runpy
import sys
import zlib
from pathlib import Path

import jax

from clip_har_jax.data.pair_batches import PairBatches
from clip_har_jax.data.pipeline import BatchIterator

NOTES, SCRIPT = Path(os.environ["NOTES"]), Path(__file__).parents[2] / "scripts" / "train.py"
compiled = 0


def on_event(event, **_):
    global compiled
    compiled += event == "/jax/compilation_cache/cache_misses"


def note_rows(iterator, start_step):
    """Make an iterator write the checksums of the batches that it gives."""
    step, read = start_step, type(iterator).__next__

    def read_and_note(self):
        nonlocal step
        batch = read(self)
        rows = [zlib.crc32(image.tobytes(), int(i)) for image, i in zip(batch.image, batch.index, strict=True)]
        step += 1
        with (NOTES / f"batches.{jax.process_index()}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "rows": rows}) + "\n")
        return batch

    iterator.__class__ = type("Noting", (type(iterator),), {"__next__": read_and_note})


def main():
    make = BatchIterator.__init__

    def make_noting(self, batches, bad_inputs, start_step=0):
        make(self, batches, bad_inputs, start_step)
        if batches.seed is not None:  # of training
            note_rows(self, start_step)

    make_pairs = PairBatches.__init__

    def make_pairs_noting(self, *arguments):
        make_pairs(self, *arguments)
        note_rows(self, self.step)

    setattr(BatchIterator, "__init__", make_noting)  # noqa: B010  (a method, to a type checker)
    setattr(PairBatches, "__init__", make_pairs_noting)  # noqa: B010
    jax.monitoring.register_event_listener(on_event)
    sys.argv[0] = str(SCRIPT)
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        (NOTES / f"compiled.{jax.process_index()}.json").write_text(json.dumps(compiled))


if __name__ == "__main__":
    main()
