"""``HoraConfig``: what a user of PEFT writes instead of ``LoraConfig``."""

import copy
import inspect
import math
import os
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, Self

from hora_spec import SPEC_VERSION, AdapterSpec, HoraError
from hora_spec.files import LAYERS_DIGEST, check_digests, layers_digest
from huggingface_hub.dataclasses import type_validator
from peft import PeftConfig
from peft.utils import PeftType

from hora_torch.card import write_card
from hora_torch.foreign import check_arguments
from hora_torch.order import Order
from hora_torch.saving import check_directory, read_checked, written_digest


@dataclass
class HoraConfig(PeftConfig):
    """Configuration of a HoRA adapter: the method, as in `hora_spec.AdapterSpec`, and where it goes.

    `hora_spec.PRESETS` has settings with a name: ``HoraConfig(r=8, **PRESETS["residual"].fields)``.

    Parameters
    ----------
    r
        Rank of the factors, and of the LoRA export.
    hidden_dim
        Width of the hypernetwork; a generated factor has at most this rank.
    head_embed_dim
        Length of a column of a head embedding.
    sharing
        What heads share: ``"full"`` A and the network that generates B, ``"a"`` A alone, which is LoRA, ``"b"`` the
        network alone, ``"none"`` nothing.
    a_source
        A as a free matrix (``"direct"``), from a ``"hypernetwork"``, or ``"fixed"`` at its start.
    activation
        Hidden activation, one of `hora_spec.ACTIVATIONS`.
    gain
        Factor on every generated factor; ``"transfer"`` makes a learning rate that suits LoRA fit.
    residual
        Add a free part to the generated B.
    normalize
        Normalise head embeddings; False is for the ablation.
    gate
        Weigh the residual by a trained number per projection that starts at this one.
    tie_a
        One A for all projections of a layer.
    hora_alpha
        ``scaling = hora_alpha / r``; None means scaling 1.
    use_rslora
        ``scaling = hora_alpha / sqrt(r)`` instead (arXiv 2312.03732); files hold the alpha that gives it.
    hora_dropout
        Probability that an input feature of the branch is dropped in training.
    target_modules
        Names or a regular expression, as for any PEFT method, or ``"all-linear"``. None adapts the query and value
        projections of every attention module found.
    exclude_modules
        Names or a regular expression of modules that are left alone.
    modules_to_save
        Names of modules that are trained whole, such as a classification head.
    layers_to_transform
        Numbers of the layers to adapt, as in ``LoraConfig``; one that matches nothing is an error.
    layers_pattern
        Name of the list that these numbers count in, where it is none of the common ones.
    rank_pattern
        Module name to its rank, in place of `r`. The targets of one attention share a hypernetwork, hence one rank;
        a key that matches nothing is an error.
    alpha_pattern
        Module name to its alpha, in place of `hora_alpha`, likewise.
    trainable_token_indices
        Rows of the embedding that are trained as they are, as in ``LoraConfig``.
    fused_projections
        Which parts of a fused weight (``qkv``, ``c_attn``, ``in_proj``) are adapted, by the names in its order of rows:
        q, k and v, or x, b and c of a state space.
    num_heads
        Heads of the targets, when the model does not tell: a number, or module name to number. A count that
        contradicts the model is an error.
    num_kv_heads
        Heads of the key and value projections, likewise.
    row_order
        Order of the rows of fused weights whose attention class is not known, by module name: ``"q k v"`` for all heads
        of q, then of k, then of v, ``"[head][q k v]"`` for q, k and v of each head in turn, and others that
        `hora_torch.order.Order` describes.
    route
        ``"auto"``, ``"branch"`` or ``"merge"``, see `hora_torch.functional.hora_linear`.
    seed
        Seed of the initial values.
    init_weights
        True starts at the base model exactly. False fills what would be zero from torch's generator, for tests.
    bias
        ``"none"``, ``"all"`` or ``"hora_only"``: which biases of the base model are trained too.
    hora_spec_version
        Version of the spec that a file follows.
    hora_layers
        Names, shapes and layouts of all adapted layers. Written on injection; given to the constructor, as by a file,
        they describe an adapter that a model must fit (``given_layers``).
    hora_layers_sha256
        Digest of the layers, in files (spec F7).
    hora_tensors_sha256
        Digest of the tensors, in files until these are loaded (spec F7).

    Raises
    ------
    HoraError
        If a value is outside its domain, was written by another version of the spec, or is not what a digest says.
    """

    r: int = 8
    hidden_dim: int = 40
    head_embed_dim: int = 40
    hora_alpha: float | None = None
    use_rslora: bool = False
    hora_dropout: float | int = 0.0
    sharing: str = "full"
    a_source: str = "direct"
    activation: str = "leaky_relu"
    gain: float | str = "transfer"
    residual: bool = False
    normalize: bool = True
    gate: float | None = None
    tie_a: bool = False
    target_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    exclude_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float | int] = field(default_factory=dict)
    fused_projections: tuple[str, ...] | list[str] = ("q", "v")
    num_heads: int | dict[str, int] | None = None
    num_kv_heads: int | None = None
    row_order: dict[str, str] | None = None
    route: str = "auto"
    seed: int = 0
    init_weights: bool = True
    bias: str = "none"
    hora_spec_version: int = SPEC_VERSION
    hora_layers: list[dict[str, Any]] | None = None
    hora_layers_sha256: InitVar[str | None] = None
    hora_tensors_sha256: str | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse arguments of other methods with the names they have here."""
        check_arguments(kwargs, list(inspect.signature(cls.__init__).parameters)[1:])
        return super().__new__(cls)

    def __post_init__(self, hora_layers_sha256: str | None) -> None:
        super().__post_init__()
        self._check_types()
        self.peft_type = PeftType.HORA
        self.given_layers = self.hora_layers  # injection writes hora_layers anew
        if self.hora_spec_version != SPEC_VERSION:
            raise HoraError(
                f"this version reads adapters of spec version {SPEC_VERSION}, got {self.hora_spec_version}: "
                "use a matching hora-torch (spec F4)"
            )
        check_digests({"hora_layers": self.hora_layers, LAYERS_DIGEST: hora_layers_sha256}, ())
        self.spec()
        if not 0 <= self.hora_dropout < 1:
            raise HoraError(f"hora_dropout must be in [0, 1), got {self.hora_dropout!r}")
        if self.use_rslora and self.hora_alpha is None and not self.alpha_pattern:
            raise HoraError("use_rslora divides hora_alpha by sqrt(r), got none: pass hora_alpha, or leave it out")
        for name, allowed in (("route", ("auto", "branch", "merge")), ("bias", ("none", "all", "hora_only"))):
            if getattr(self, name) not in allowed:
                raise HoraError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        self.fused_projections = tuple(self.fused_projections)
        if not self.fused_projections or not all(map(str.isidentifier, self.fused_projections)):
            raise HoraError(f"fused_projections are names of parts, as 'q', 'k', 'v', got {self.fused_projections!r}")
        for order in (self.row_order or {}).values():
            Order.parse(order)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise HoraError(
                "layers_pattern needs layers_to_transform: when `layers_pattern` is specified, `layers_to_transform` "
                "must also be specified; leave layers_pattern out, or say which layers"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise HoraError(
                "layers_to_transform cannot be used when target_modules is a str: put the layer numbers into the regex"
            )

    def _check_types(self) -> None:
        """What is not of its annotated type may still work, as something else: a string as the list of its letters."""
        of_method = {each.name for each in fields(AdapterSpec)} | {"r", "hora_alpha"}  # checked by the spec itself
        for name, hint in HoraConfig.__annotations__.items():
            value = getattr(self, name, None)
            if name in of_method or isinstance(hint, InitVar):
                continue
            try:
                type_validator(name, value, hint)
                known = not isinstance(value, bool) or hint is bool  # to Python a bool is an int
            except TypeError:
                known = False
            if not known:
                raise HoraError(f"{name} is a {getattr(hint, '__name__', hint)}, got {value!r}")

    def spec(self, rank: int | None = None, alpha: float | None = None) -> AdapterSpec:
        """The method of one layer; `rank` and `alpha` override those of the config."""
        names = [each.name for each in fields(AdapterSpec) if each.name not in ("rank", "alpha")]
        method: dict[str, Any] = {name: getattr(self, name) for name in names}
        alpha = self.hora_alpha if alpha is None else alpha
        spec = AdapterSpec(self.r if rank is None else rank, alpha=alpha, **method)
        if self.use_rslora and spec.alpha is not None:
            return spec.replace(alpha=spec.alpha * math.sqrt(spec.rank))
        return spec

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; sets become sorted lists, so equal configs write equal files."""
        values = {
            key: sorted(value) if isinstance(value, set) else list(value) if isinstance(value, tuple) else value
            for key, value in super().to_dict().items()
        }
        return values if self.hora_layers is None else values | {LAYERS_DIGEST: layers_digest(self.hora_layers)}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """The config of an adapter; a local directory is checked whole, tensors included, before a model changes.

        Raises
        ------
        HoraError
            If the directory is damaged or does not hold what its config describes (spec F1 to F7).
        """
        directory = os.path.join(pretrained_model_name_or_path, subfolder or "")
        if os.path.isdir(directory):
            check_directory(directory)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The JSON object of a file; a HoraError if the tensors beside it are not its own (spec F7)."""
        return read_checked(path_json_file) or super().from_json_file(path_json_file, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and how to load the adapter into ``README.md``.

        PEFT, which has just written the tensors, gets their digest into the config (spec F7).

        PEFT is known by the keyword ``auto_mapping_dict``. Others, such as Transformers, write the tensors later: the
        digest of what lies there would be wrong, so there is none.
        """
        written = copy.copy(self)
        written.hora_tensors_sha256 = written_digest(save_directory) if "auto_mapping_dict" in kwargs else None
        super(HoraConfig, written).save_pretrained(save_directory, **kwargs)
        write_card(save_directory, self.base_model_name_or_path)
        self.hora_tensors_sha256 = None  # that of a file read earlier, which this config may have left behind
