"""`import flows` is light and changes nothing outside itself."""

import json
import subprocess
import sys

HEAVY = {
    "IPython",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "numba",
    "pytorch_lightning",
    "rich",
    "sklearn",
    "tensorboard",
    "torchmetrics",
    "torchvision",
    "triton",
    "wandb",
}

CODE = """
import json, logging, os, random, signal, sys, warnings
import numpy, torch
import torch.distributions


def settings():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad mode": torch.is_grad_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": numpy.random.get_state()[1].tolist(),
        "python rng": hash(random.getstate()),
        "validate distributions": torch.distributions.Distribution._validate_args,
        "print options": str(vars(torch._tensor_str.PRINT_OPTS)),
        "module call": torch.nn.Module.__call__.__qualname__,
        "warning filters": list(map(str, warnings.filters)),
        "log level": logging.getLogger().level,
        "environment": dict(os.environ),
        "interrupt": str(signal.getsignal(signal.SIGINT)),
        "path": sys.path,
    }


before = settings()
import flows
after = settings()
changed = [name for name in before if before[name] != after[name]]
print(json.dumps({"changed": changed, "modules": sorted(sys.modules)}))
"""


def test_import_is_light_and_changes_no_settings():
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True, check=True
    )
    result = json.loads(process.stdout)
    loaded = {name.partition(".")[0] for name in result["modules"]}
    assert "nflows" in loaded
    assert not loaded & HEAVY
    assert not {"nflows.flows", "nflows.distributions"} & set(result["modules"])
    assert not any(name.startswith("flows.training") for name in result["modules"])
    assert result["changed"] == []
