"""diffusers' ``scheduler_config.json`` as fields of an objective and of how images are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.diffusion.noising import DDPM, PREDICTIONS, RANGED, SCHEDULES
from zoo.diffusion.times import LEVELS
from zoo.errors import WeightsError, near
from zoo.weights.files import read_json

SAMPLERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "DPMSolverMultistepScheduler": "dpm-solver",
    "EulerDiscreteScheduler": "euler",
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {"clip_sample": True},
    "DDIMScheduler": {"clip_sample": True, "set_alpha_to_one": True},
    "PNDMScheduler": {"skip_prk_steps": False},
    "DPMSolverMultistepScheduler": {"timestep_spacing": "linspace"},
    "EulerDiscreteScheduler": {"timestep_spacing": "linspace"},
}
"""Where a class's own defaults differ from ``COMMON``'s: a file may leave fields out."""

COMMON: dict[str, Any] = {
    "num_train_timesteps": LEVELS, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
    "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": False,
    "rescale_betas_zero_snr": False, "skip_prk_steps": True, "clip_sample": False,
}  # fmt: skip

FIXED: dict[str, Any] = {
    "trained_betas": None, "thresholding": False, "variance_type": "fixed_small", "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False, "use_flow_sigmas": False,
    "interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero", "sigma_min": None,
    "sigma_max": None, "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint",
    "lower_order_final": True, "euler_at_final": False, "num_train_timesteps": LEVELS, "skip_prk_steps": True,
}  # fmt: skip
"""What the zoo's samplers have in one form only."""

OF = {"variance_type": "DDPMScheduler", "skip_prk_steps": "PNDMScheduler"}
"""Fields that mean something in one class only."""


def scheduler_fields(folder: Path, corrected: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of ``DiffusionConfig`` and of ``LatentDrawingFields`` for a pipeline's folder ``scheduler``.

    Args:
        corrected: The pipeline sets ``steps_offset`` = 1 and ``clip_sample`` = false whatever the file says, as
            ``StableDiffusionPipeline`` does.

    Raises:
        WeightsError: Another scheduler, or something that the zoo's samplers do not have.
    """
    path = folder / "scheduler_config.json"
    stated = read_json(path)
    kind, where = str(stated.get("_class_name")), f"{path.name} of {str(folder)!r}"
    if kind not in SAMPLERS:
        raise WeightsError(f"{where}: the zoo has no sampler for {kind!r}{near(kind, SAMPLERS)}")
    config = {**COMMON, **DEFAULTS.get(kind, {}), **stated}
    for key, value in FIXED.items():
        if OF.get(key, kind) == kind and config.get(key, value) not in (value, None if value is False else value):
            raise WeightsError(f"{where}: {key} = {config[key]!r}; the zoo reads {value!r} alone")
    if config["clip_sample"] and not corrected:
        raise WeightsError(f"{where}: clip_sample = true is for pixels; set it to false, latents go beyond 1")
    schedule, prediction = config["beta_schedule"], config["prediction_type"]
    if schedule not in SCHEDULES or prediction not in PREDICTIONS:
        raise WeightsError(f"{where}: {schedule!r} and {prediction!r} are no noise schedule and prediction of the zoo")
    zero = bool(config["rescale_betas_zero_snr"])
    known = DDPM(schedule, prediction if prediction != "epsilon" else "sample", zero).fields()
    if schedule in RANGED and any(abs(config[k] - known[k]) > 1e-9 for k in ("beta_start", "beta_end")):
        raise WeightsError(
            f"{where}: {schedule} from {config['beta_start']} to {config['beta_end']}; the zoo's goes from"
            f" {known['beta_start']} to {known['beta_end']}"
        )
    objective = {"schedule": schedule, "prediction": prediction, **({"zero_snr": True} if zero else {})}
    drawing = {
        "sampler": SAMPLERS[kind],
        "spacing": config["timestep_spacing"],
        "offset": 1 if corrected else config["steps_offset"],
        "clean_end": bool(config["set_alpha_to_one"]),
    }
    return objective, drawing
