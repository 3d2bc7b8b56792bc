"""Steps 5 to 12 of a run: what needs torch, imported together once everything that needs no torch is checked."""

from finetune_trainer.checkpoints.fingerprint import fingerprint
from finetune_trainer.engine.ahead import compile_kernels_ahead
from finetune_trainer.engine.plan import apply_plan, plan_execution, prepare_base, prove_plan
from finetune_trainer.evaluation.evaluator import eval_prompts
from finetune_trainer.methods import METHODS
from finetune_trainer.model.adapter import attach_adapter, check_init_from
from finetune_trainer.model.base import inspect_base_model
from finetune_trainer.model.checkpoint import check_weights
from finetune_trainer.model.weights import load_base_model
from finetune_trainer.publishing.bundle import write_bundle
from finetune_trainer.publishing.export import check_exports, plan_exports, run_exports
from finetune_trainer.publishing.lineage import lineage_of
from finetune_trainer.publishing.verify import make_verifier
from finetune_trainer.runtime.device import seed
from finetune_trainer.training.session import TrainingSession

__all__ = [
    "METHODS",
    "TrainingSession",
    "apply_plan",
    "attach_adapter",
    "check_exports",
    "check_init_from",
    "check_weights",
    "compile_kernels_ahead",
    "eval_prompts",
    "fingerprint",
    "inspect_base_model",
    "lineage_of",
    "load_base_model",
    "make_verifier",
    "plan_execution",
    "plan_exports",
    "prepare_base",
    "prove_plan",
    "run_exports",
    "seed",
    "write_bundle",
]
