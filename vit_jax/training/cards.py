"""The table of graphics cards that `--dry_run --target` compiles for. Standard library only."""

import dataclasses
import difflib

from vit_jax.errors import ConfigError

CUDNN = (9, 28)  # the version that all cards are described with


@dataclasses.dataclass(frozen=True)
class Card:
    """A card as its maker specifies it."""

    description: str  # as the driver names it
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of a core
    ghz: float  # boost clock
    bandwidth: float  # of the memory, bytes/s
    l2: int  # bytes
    memory: int  # bytes that a process sees
    shared: int  # bytes of shared memory that a block may have; a core has 1,024 more
    threads: int  # that a core holds at once
    bfloat16: float  # products a second, dense, accumulated in float32: FLOP/s

    @property
    def float32(self) -> float:
        """Peak FLOP/s in float32 without tensor cores."""
        return 2 * self.elementwise

    @property
    def elementwise(self) -> float:
        """Elementwise operations a second: one a clock and float32 unit."""
        return self.cores * self.lanes * self.ghz * 1e9

    @property
    def transcendental(self) -> float:
        """Exponentials, logarithms, roots and the like a second: every core has 16 units for them."""
        return self.cores * 16 * self.ghz * 1e9

    def proto(self) -> str:
        """The card as the text of XLA's GpuTargetConfigProto, with CUDA 12.9."""
        fields = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 49152,
            "shared_memory_per_core": self.shared + 1024,
            "threads_per_core_limit": self.threads,
            "core_count": self.cores,
            "fpus_per_core": self.lanes,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "memory_bandwidth": int(self.bandwidth),
            "l2_cache_size": self.l2,
            "clock_rate_ghz": self.ghz,
            "device_memory_size": self.memory,
            "shared_memory_per_block_optin": self.shared,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
        }
        info = "\n".join(f"  {name}: {value}" for name, value in fields.items())
        major, minor = self.capability
        return (
            f"gpu_device_info {{\n{info}\n  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
            f'platform_name: "CUDA"\ndnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}\n'
            "runtime_version { major: 12 minor: 9 patch: 0 }\n"
            f'device_description_str: "{self.description}"\n'
        )


# Limits of cores, blocks and shared memory: CUDA C++ Programming Guide, table of compute capabilities. Cores, clocks, caches
# and rates of tensor cores: NVIDIA's whitepapers of Ampere (A100), Hopper (H100) and Ada (L4, RTX 4090) and their data sheets.
# Memory and bandwidth of the A100, H100 and B200, and all of the B200 but its tensor cores (data sheet of the HGX B200): the
# descriptions that openxla/xla has in xla/backends/gpu/target_config/specs. L4 and RTX 4090: 24 GB as a process sees it.
CARDS = {
    "h100": Card(
        "NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        lanes=128,
        ghz=1.98,
        bandwidth=3.35232e12,
        l2=52_428_800,
        memory=84_929_347_584,
        shared=232_448,
        threads=2048,
        bfloat16=989e12,
    ),
    "a100": Card(
        "NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        lanes=64,
        ghz=1.41,
        bandwidth=2.039e12,
        l2=41_943_040,
        memory=84_987_740_160,
        shared=166_912,
        threads=2048,
        bfloat16=312e12,
    ),
    "l4": Card(
        "NVIDIA L4",
        capability=(8, 9),
        cores=58,
        lanes=128,
        ghz=2.04,
        bandwidth=0.3e12,
        l2=50_331_648,
        memory=23_622_320_128,
        shared=101_376,
        threads=1536,
        bfloat16=121e12,
    ),
    "b200": Card(
        "NVIDIA B200",
        capability=(10, 0),
        cores=148,
        lanes=128,
        ghz=1.965,
        bandwidth=7.67232e12,
        l2=132_644_864,
        memory=191_514_411_008,
        shared=232_448,
        threads=2048,
        bfloat16=2250e12,
    ),
    "rtx4090": Card(
        "NVIDIA GeForce RTX 4090",
        capability=(8, 9),
        cores=128,
        lanes=128,
        ghz=2.52,
        bandwidth=1.008e12,
        l2=75_497_472,
        memory=25_386_352_640,
        shared=101_376,
        threads=1536,
        bfloat16=165.2e12,
    ),
}


def card(name: str) -> Card:
    """The card of this name; ConfigError if there is none, with the names of the table."""
    if name in CARDS:
        return CARDS[name]
    near = difflib.get_close_matches(name.lower(), CARDS, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise ConfigError(f"--target {name}: there is no such card; cards are {', '.join(CARDS)}{hint}")
