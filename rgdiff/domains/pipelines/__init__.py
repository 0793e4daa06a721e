"""Released pipelines as a domain: states are latents (or pixels) of a diffusers folder, and rewards see pictures."""

from rgdiff.domains.pipelines.data import PipelineDomain, opened, pipeline, shaped
from rgdiff.domains.pipelines.judge import PipelineJudge

__all__ = ["PipelineDomain", "PipelineJudge", "opened", "pipeline", "shaped"]
