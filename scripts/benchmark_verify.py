"""Compare the speed of `int8cli verify` with that of cat.

    python scripts/benchmark_verify.py DIR

DIR is a conversion of some GB that fits in the page cache. Reads all shards with `cat > /dev/null` and with the pass of
verify, in turn, and prints the medians and the median of the ratios.
"""

import argparse
import statistics
import subprocess
import time
from pathlib import Path

from int8cli.progress import SILENT
from int8cli.records.store import RecordStore
from int8cli.verification.files import DigestPass

RUNS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the speed of verify with that of cat.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    store = RecordStore(options.directory)
    conversion = store.conversion()
    if conversion is None:
        parser.error(f"{options.directory} is not a conversion")
    records = [record for shard in conversion.shards if (record := store.record(shard)) is not None]
    files = [file for record in records for file in record.files]
    paths = [str(options.directory / file.file) for file in files]
    cat_s, verify_s = [], []
    for _ in range(RUNS):
        begin = time.perf_counter()
        with open("/dev/null", "wb") as null:
            subprocess.run(["cat", *paths], check=True, stdout=null)
        cat_s.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        failures = DigestPass(options.directory, files, options.threads, SILENT).run()
        verify_s.append(time.perf_counter() - begin)
        if failures:
            parser.error(f"{failures[0].file} {failures[0].problem}")
    size_gb = sum(file.size_bytes for file in files) / 1e9
    ratio = statistics.median(cat / verify for cat, verify in zip(cat_s, verify_s, strict=True))
    print(
        f"{size_gb:.2f} GB, {options.threads} threads: verify {size_gb / statistics.median(verify_s):.1f} GB/s,",
        end=" ",
    )
    print(f"cat {size_gb / statistics.median(cat_s):.1f} GB/s; {ratio:.2f} times the speed of cat")


if __name__ == "__main__":
    main()
