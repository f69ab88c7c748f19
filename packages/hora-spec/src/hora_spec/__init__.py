"""The HoRA method as a specification: shapes, initialisation, reference, files and the conformance kit.

HoRA (arXiv 2510.04295) lets one small hypernetwork per attention layer generate the low-rank factors of all heads of
its projections together. This package decides every number; ``hora_torch`` and ``hora_jax`` allocate and contract.
"""

from hora_spec import reference
from hora_spec.activations import ACTIVATIONS, LEAKY_RELU_SLOPE
from hora_spec.adapter import Adapter, AdapterLayer, Site
from hora_spec.combining import combine
from hora_spec.errors import HoraError
from hora_spec.files import SPEC_VERSION, layer_from_json, layer_to_json, load_adapter, save_adapter
from hora_spec.gguf_adapter import export_gguf
from hora_spec.goldens import Golden, load_goldens
from hora_spec.init import init_params
from hora_spec.joint import JointStart, Measure, Moments, joint_start
from hora_spec.layout import Layout, Window
from hora_spec.lora import LoraModule, portable, to_lora
from hora_spec.lora_files import export_lora
from hora_spec.merged import save_merged
from hora_spec.presets import PRESETS, preset
from hora_spec.reference import Factors
from hora_spec.shapes import (
    LayerShape,
    ProjectionShape,
    check_params,
    count_params,
    is_trained,
    name_of_a,
    param_shapes,
)
from hora_spec.sharing import generated_share
from hora_spec.spec import LAYER_NORM_EPS, AdapterSpec
from hora_spec.verification import verify_export

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "LAYER_NORM_EPS",
    "LEAKY_RELU_SLOPE",
    "PRESETS",
    "SPEC_VERSION",
    "Adapter",
    "AdapterLayer",
    "AdapterSpec",
    "Factors",
    "Golden",
    "HoraError",
    "JointStart",
    "LayerShape",
    "Layout",
    "LoraModule",
    "Measure",
    "Moments",
    "ProjectionShape",
    "Site",
    "Window",
    "check_params",
    "combine",
    "count_params",
    "export_gguf",
    "export_lora",
    "generated_share",
    "init_params",
    "is_trained",
    "joint_start",
    "layer_from_json",
    "layer_to_json",
    "load_adapter",
    "load_goldens",
    "name_of_a",
    "param_shapes",
    "portable",
    "preset",
    "reference",
    "save_adapter",
    "save_merged",
    "to_lora",
    "verify_export",
]
