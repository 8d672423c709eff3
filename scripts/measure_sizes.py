"""Time on one, eight and a hundred machines, for BLOOM-176B and a trillion parameters: the table of docs/scale-out.md.

    python scripts/measure_sizes.py [DIRECTORY]

Measures the rate at which this machine quantizes, makes both checkpoints with their true shapes as sparse files (which
use no disk space), and asks the same functions as `int8cli estimate-memory --machines N --network RATE`.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from measure_bloom_estimate import HIDDEN, LAYERS, make_bloom  # noqa: E402

from int8cli.checkpoint.directory import DirectorySource  # noqa: E402
from int8cli.commands.ways import speed_here  # noqa: E402
from int8cli.estimate.machines import on_machines  # noqa: E402
from int8cli.estimate.ways import DISK_BYTES_A_SECOND  # noqa: E402
from int8cli.machine.speed import usable_cores  # noqa: E402
from int8cli.planning.decisions import PlanOptions  # noqa: E402
from int8cli.planning.survey import survey_source  # noqa: E402
from int8cli.results.units import human_bytes, human_seconds  # noqa: E402

# BLOOM itself, and its shapes wider and deeper: 1.0 T parameters in 200 shards of 10 GB.
MODELS = {"BLOOM-176B": (LAYERS, HIDDEN), "a trillion parameters": (198, 20480)}
MACHINES = (1, 8, 100)
NETWORKS = {"1 Gbit/s": 1e9 / 8, "10 Gbit/s": 1e10 / 8, "source on the disk": None}
DISKS = {"this disk": DISK_BYTES_A_SECOND, "a disk with a quarter of its rate": DISK_BYTES_A_SECOND / 4}
CORES = (2, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=Path(tempfile.gettempdir()) / "sparse-checkpoints")
    directory = parser.parse_args().directory
    here = speed_here("cpu")
    a_core = here.quantized_bytes / usable_cores()
    rates = f"{human_bytes(a_core)}/s a core become int8, {human_bytes(DISK_BYTES_A_SECOND)}/s are read and written"
    print(f"measured: {rates}")
    print("| model | network | cores | disk | " + " | ".join(map(str, MACHINES)) + " |")
    for name, (layers, hidden) in MODELS.items():
        total = make_bloom(directory / name, layers, hidden)
        survey = survey_source(DirectorySource(directory / name), PlanOptions())
        print(f"{name}: {human_bytes(total)} in {len(survey.shards)} shards → {human_bytes(survey.output_bytes)}")
        for network, rate in NETWORKS.items():
            for cores in CORES:
                for disk, disk_rate in DISKS.items():
                    speed = replace(here, quantized_bytes=a_core * cores)
                    rows = on_machines(survey, MACHINES, speed, rate, disk_rate)
                    times = " | ".join(human_seconds(row.seconds or 0.0) for row in rows)
                    print(f"| {name} | {network} | {cores} | {disk} | {times} |")


if __name__ == "__main__":
    main()
