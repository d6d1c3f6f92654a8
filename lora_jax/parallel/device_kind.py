"""What a kind of accelerator can do: arithmetic, memory traffic, memory."""

from typing import NamedTuple

from lora_jax.ops.target import target_device

GIB = 2**30


class DeviceKind(NamedTuple):
    """The data sheet of one kind of device.

    Attributes:
      flops: FLOP/s of a dense matmul in bfloat16.
      bandwidth: bytes/s of the device's memory.
      memory: bytes of the device's memory.
    """

    flops: float
    bandwidth: float
    memory: int

    @property
    def intensity(self) -> float:
        """FLOPs per byte read at which arithmetic and memory take equally long."""
        return self.flops / self.bandwidth


# By the start of JAX's `device_kind`, the longest first. From the makers' data sheets:
# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, nvidia.com/data-center.
KINDS = {
    "TPU v5 lite": DeviceKind(197e12, 819e9, 16 * GIB),  # v5e
    "TPU v6 lite": DeviceKind(918e12, 1640e9, 32 * GIB),  # v6e
    "TPU v5": DeviceKind(459e12, 2765e9, 95 * GIB),  # v5p
    "TPU v4": DeviceKind(275e12, 1228e9, 32 * GIB),
    "NVIDIA H200": DeviceKind(989e12, 4800e9, 141 * GIB),
    "NVIDIA H100": DeviceKind(989e12, 3350e9, 80 * GIB),
    "NVIDIA A100-SXM4-40": DeviceKind(312e12, 1555e9, 40 * GIB),
    "NVIDIA A100": DeviceKind(312e12, 2039e9, 80 * GIB),
    "NVIDIA L40S": DeviceKind(362e12, 864e9, 48 * GIB),
    "NVIDIA L4": DeviceKind(121e12, 300e9, 24 * GIB),
}
UNKNOWN = DeviceKind(300e12, 1000e9, 16 * GIB)  # an accelerator that is not listed


def target_kind() -> DeviceKind:
    """Returns the data sheet of the accelerator that is compiled for.

    On a mesh it is that of its devices, which may not be on this machine.

    Returns:
      The entry of `KINDS`, or `UNKNOWN`.
    """
    return kind_named(target_device())


def kind_named(name: str) -> DeviceKind:
    """Returns the data sheet of a `device_kind`.

    Args:
      name: as JAX calls it.

    Returns:
      The entry of `KINDS`, or `UNKNOWN`.

    Example:
      >>> round(kind_named("TPU v5 lite").intensity)
      241
    """
    starts = sorted(KINDS, key=len, reverse=True)
    start = next((start for start in starts if name.startswith(start)), None)
    return UNKNOWN if start is None else KINDS[start]
