"""hetmoe: mixture-of-experts language models with most experts on noisy analog crossbars."""

from hetmoe.analog.calibration import Calibration, RangeMethod, calibration_from
from hetmoe.analog.devices import DEVICES, get_device
from hetmoe.analog.programming import ProgrammedWeights, SeededWeights, program, seeded_weights
from hetmoe.analog.read_noise import ReadNoise, make_read_noise
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.checkpoint.load import load_model
from hetmoe.checkpoint.save import save_model
from hetmoe.errors import CheckpointWarning, InputError
from hetmoe.evaluate.calibrate import calibrate, collect_statistics
from hetmoe.evaluate.calibration_file import load_calibration, save_calibration
from hetmoe.hardware.predict import predict_decode
from hetmoe.models.config import ModelConfig
from hetmoe.models.model import Model
from hetmoe.models.params import Params
from hetmoe.models.transformer import forward
from hetmoe.ops.crossbar_matmul.api import crossbar_matmul
from hetmoe.parallel.mesh import make_mesh, parse_mesh
from hetmoe.parallel.model import forward_on, program_on
from hetmoe.placement.budget import place_within
from hetmoe.placement.module_scores import ModuleScores, module_parameters
from hetmoe.placement.plan import Plan, all_analog, all_digital, experts_analog, place
from hetmoe.placement.plan_file import load_plan, save_plan
from hetmoe.placement.scores import RULES, score_experts, score_modules

__all__ = [
    "DEVICES",
    "RULES",
    "AnalogSpec",
    "Calibration",
    "CheckpointWarning",
    "InputError",
    "Model",
    "ModelConfig",
    "ModuleScores",
    "Params",
    "Plan",
    "ProgrammedWeights",
    "RangeMethod",
    "ReadNoise",
    "SeededWeights",
    "all_analog",
    "all_digital",
    "analog_spec",
    "calibrate",
    "calibration_from",
    "collect_statistics",
    "crossbar_matmul",
    "experts_analog",
    "forward",
    "forward_on",
    "get_device",
    "load_calibration",
    "load_model",
    "load_plan",
    "make_mesh",
    "make_read_noise",
    "module_parameters",
    "parse_mesh",
    "place",
    "place_within",
    "predict_decode",
    "program",
    "program_on",
    "save_calibration",
    "save_model",
    "save_plan",
    "score_experts",
    "score_modules",
    "seeded_weights",
]
