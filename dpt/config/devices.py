"""GPUs' peak rates by their makers' data sheets."""

_BF16_DENSE = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "GH200": 989.4e12,
    "H800": 989.4e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
_TF32_SHARE = 0.5
"""TF32 runs at half the rate of bf16 on all of these that have it."""


def data_sheet_peak(device_name: str, precision: str = "bf16") -> float | None:
    """Dense FLOP/s of a GPU's matrix units by its data sheet (NVIDIA; no sparsity), None if unknown.

    `device_name`: as returned by `torch.cuda.get_device_name`. `precision`: "bf16", "fp16" or "tf32".
    """
    matches = [name for name in _BF16_DENSE if all(word in device_name for word in name.split())]
    if not matches:
        return None
    peak = _BF16_DENSE[max(matches, key=len)]
    return peak * (_TF32_SHARE if precision == "tf32" else 1.0)
