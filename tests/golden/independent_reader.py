"""Reads a prior's folder without prior_hub, safetensors or torch, and prints `expected.json`.

    python tests/golden/independent_reader.py tests/golden/format-1.0/single > tests/golden/format-1.0/expected.json

A safetensors file: 8 bytes of header length (little endian), a JSON header, then the tensors' bytes.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}


def read_file(path: Path) -> dict:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    tensors = {}
    for key, entry in json.loads(content[8 : 8 + length]).items():
        if key != "__metadata__":
            start, stop = entry["data_offsets"]
            values = np.frombuffer(content[8 + length :][start:stop], TYPES[entry["dtype"]]).reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)  # the upper half of a float32
            tensors[key] = {"dtype": entry["dtype"], "shape": entry["shape"], "values": values}
    return tensors


def read_folder(folder: Path) -> dict:
    tensors = {}
    for path in sorted(folder.glob("prior*.safetensors")):
        tensors |= read_file(path)
    return dict(sorted(tensors.items()))


def penalty_at_zero(config: dict, tensors: dict) -> float:
    """1/2 mean^T Sigma^-1 mean, with Sigma as a dense matrix."""

    def stacked(kind: str, rows: int) -> np.ndarray:
        return np.concatenate(
            [tensors[f"{kind}.{name}"]["values"].astype(np.float64).reshape(rows, -1) for name in config["parameters"]], axis=1
        )

    mean, variance, rows = stacked("mean", 1)[0], stacked("variance", 1)[0], stacked("deviations", config["rank"])
    low_rank = config["low_rank_weight"] * rows.T @ rows
    sigma = config["scale"] * (config["diagonal_weight"] * np.diag(variance) + low_rank) + config["eps"] * np.eye(mean.size)
    return float(0.5 * mean @ np.linalg.solve(sigma, mean))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    config, tensors = json.loads((folder / "prior_config.json").read_text()), read_folder(folder)
    settings = (
        "rank",
        "scale",
        "diagonal_weight",
        "low_rank_weight",
        "eps",
        "variance_floor",
        "num_snapshots",
        "num_parameters",
    )
    expected = {
        "settings": {key: config[key] for key in settings},
        "penalty_at_zero": penalty_at_zero(config, tensors),
        "tensors": {key: entry | {"values": entry["values"].tolist()} for key, entry in tensors.items()},
    }
    print(json.dumps(expected, indent=1))
