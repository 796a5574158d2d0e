"""What a device could do at most, the denominator of MFU."""

import re
import time

import torch

TERA = 1e12
# Products of bfloat16 matrices (float16 where a GPU has no other), added up in float32, without sparsity: data sheets
# of NVIDIA and AMD. Names are as the driver gives them; one that fits nothing here is measured.
KNOWN = (
    (r"\bH(100|200) NVL\b", 835.5),
    (r"\bH100 PCIe\b", 756.5),
    (r"\b(H100|H200|H800|GH200)\b", 989.4),
    (r"\bB200\b", 2250.0),
    (r"\bH20\b", 148.0),
    (r"\bA(100|800)\b", 312.0),
    (r"\bA40\b", 149.7),
    (r"\bA30\b", 165.0),
    (r"\bA10\b", 125.0),
    (r"\bL40S\b", 362.05),
    (r"\bL40\b", 181.05),
    (r"\bL4\b", 121.0),
    (r"\bRTX 6000 Ada\b", 364.2),
    (r"\bRTX A6000\b", 154.8),
    (r"\bRTX 4090$", 165.2),
    (r"\bRTX 3090$", 71.0),
    (r"\bV100S\b", 130.0),
    (r"\bV100-PCIE\b", 112.0),
    (r"\bV100\b", 125.0),
    (r"\bT4\b", 65.0),
    (r"\bMI300X\b", 1307.4),
)
MEASURED_SECONDS = 0.05


def peak_flops(device: torch.device, dtype: torch.dtype, tflops: float | None = None) -> tuple[float, str]:
    """Operations per second that `device` can do at most in `dtype`, and where the figure comes from.

    `tflops`, if given, is the figure; else that of the data sheet; else, on a CPU, an unknown GPU and in float32, what
    a product of large matrices reaches here and now.
    """
    if tflops is not None:
        return tflops * TERA, "train.peak_tflops"
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        if (known := known_peak(name)) is not None:
            return known * TERA, f"data sheet of {name}"
    return measured_peak(device, dtype), f"measured by a product of {str(dtype).removeprefix('torch.')} matrices"


def known_peak(name: str) -> float | None:
    """TFLOP/s of a GPU's data sheet; None where it is not known."""
    return next((tflops for pattern, tflops in KNOWN if re.search(pattern, name)), None)


@torch.no_grad()
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of several products; takes about `MEASURED_SECONDS`."""
    size = 512 if device.type == "cpu" else 4096
    # Random numbers, for a GPU is faster on others; of a generator of their own, for the run's must not be touched.
    left, right = torch.rand(2, size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    seconds, end = float("inf"), time.perf_counter() + MEASURED_SECONDS
    while time.perf_counter() < end or seconds == float("inf"):
        start = time.perf_counter()
        left @ right
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds = min(seconds, time.perf_counter() - start)
    return 2 * size**3 / seconds
