"""Objectives: `objective(model, batch)` -> named losses and a report.

A loss is a local sum times `batch.normalizers[count]`, so that the mean over ranks and micro-steps is the
mean over all that is counted in the optimizer step.
"""

from engine.objectives.batch_coupled import BatchCoupledObjective, Features, StepLoss
from engine.objectives.pretraining import Objective, PretrainingModule, build_objectives

__all__ = ["BatchCoupledObjective", "Features", "Objective", "PretrainingModule", "StepLoss", "build_objectives"]
