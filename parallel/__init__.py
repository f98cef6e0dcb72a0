"""How work is split: sequence shards, the motions between them, the mesh of processes, sharded parameters."""

from .attention import causal_attention
from .canonical import CanonicalModel
from .collectives import CommunicationError
from .convolution import Filter, FiniteFilter, ModalFilter, SharedFilter, begin_convolve, convolve
from .experts import run_experts
from .fsdp import clip_gradients, local_part, shard_model
from .halo import halo, projected_halo
from .ledger import CommunicationLedger, LedgerRow
from .mesh import Degrees, Mesh, MeshConfig
from .pair_sum import pair_sum
from .prefix import PendingState, begin_prefix_state, prefix_state
from .reduce import global_sum
from .reshard import begin_reshard, reshard
from .sequential import sequential_state
from .shard import Link, SequenceShard, Strategies
from .transitions import Constant, Dense, LogSpace, PerChannel, PerHead, Transition

__all__ = [
    "CanonicalModel",
    "CommunicationError",
    "CommunicationLedger",
    "Constant",
    "Degrees",
    "Dense",
    "Filter",
    "FiniteFilter",
    "LedgerRow",
    "Link",
    "LogSpace",
    "Mesh",
    "MeshConfig",
    "ModalFilter",
    "PendingState",
    "PerChannel",
    "PerHead",
    "SequenceShard",
    "SharedFilter",
    "Strategies",
    "Transition",
    "begin_convolve",
    "begin_prefix_state",
    "begin_reshard",
    "causal_attention",
    "clip_gradients",
    "convolve",
    "global_sum",
    "halo",
    "local_part",
    "pair_sum",
    "prefix_state",
    "projected_halo",
    "reshard",
    "run_experts",
    "sequential_state",
    "shard_model",
]
