"""On a GPU: the numbers of the processor, in the ways that only a GPU runs."""

import copy

import accelerate
import hora_torch
import peft
import pytest
import torch
import transformers
from torch import nn

from .conftest import FAMILIES
from .oracle import adapted, agree, config, current, differ, evaluate, output, parameters, truth, written
from .quantised_models import inputs as tokens
from .quantised_models import save_float_model

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch reaches no GPU here"),
    pytest.mark.filterwarnings("ignore:.*TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),  # of compiled parts without kernels
]
GPU = torch.device("cuda")


@pytest.fixture(params=[name for name in FAMILIES if name != "clip"])  # whose result has no one output
def family(request):
    return FAMILIES[request.param]


def on_gpu(inputs):
    return {key: value.to(GPU) for key, value in inputs.items()}


def host(model):
    """A copy whose parameters the oracle can read."""
    return copy.deepcopy(model).cpu()


def loss(model, inputs):
    found = output(model(**inputs)).float()
    weights = torch.linspace(-1, 1, found.numel(), device=found.device).reshape(found.shape)  # a norm's mean is fixed
    return (found * weights).mean() + found.square().mean()


def gradients(model, inputs):
    model.zero_grad()
    loss(model, inputs).backward()
    return {key: param.grad.clone().cpu() for key, param in parameters(model).items()}


@pytest.fixture
def rounded_products():
    """Products of float32 may be rounded to TF32's 10 bits, as many training scripts ask."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_outputs_and_gradients_are_those_of_the_processor(family):
    model = adapted(family)
    expected, grads = truth(family, current(model)), gradients(model, family.inputs())
    model.to(GPU)
    found = evaluate(model, on_gpu(family.inputs()))
    assert found.device.type == "cuda"
    agree(found.cpu(), expected)
    for key, grad in gradients(model, on_gpu(family.inputs())).items():
        torch.testing.assert_close(grad, grads[key], rtol=1e-3, atol=1e-4 * float(grads[key].abs().max()))


def test_an_adapter_is_made_where_the_base_is(family):
    model = peft.get_peft_model(family.model().to(GPU), config()).eval()
    assert {param.device.type for param in parameters(model).values()} == {"cuda"}
    agree(evaluate(model, on_gpu(family.inputs())).cpu(), truth(family, current(host(model))))


def test_merge_unmerge_save_and_load_are_those_of_the_processor(family, tmp_path):
    model = adapted(family).to(GPU)
    inputs, expected = on_gpu(family.inputs()), truth(family, current(host(model)))
    base = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter()
    agree(evaluate(model, inputs).cpu(), expected)
    model.unmerge_adapter()
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    agree(truth(family, written(tmp_path)), expected)
    loaded = peft.PeftModel.from_pretrained(family.model().to(GPU), tmp_path).eval()
    agree(evaluate(loaded, inputs).cpu(), expected)
    agree(evaluate(loaded.merge_and_unload(), inputs).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_sums_in_float32_whatever_products_are_rounded_to(families, dtype, rounded_products):
    family = families["timm-vit"]
    model = peft.get_peft_model(family.model().to(dtype), config(r=8, hora_alpha=512.0))
    expected = host(model).merge_and_unload()
    found = model.to(GPU).merge_and_unload()
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        step = torch.finfo(dtype).eps * float(other.abs().max())
        assert (one.cpu() - other).abs().max() <= 4 * step, name


def test_factors_are_generated_in_float32_whatever_products_are_rounded_to(families, rounded_products):
    model = adapted(families["llama"])
    expected = [hypernet() for hypernet in hypernets(model)]
    for hypernet, factors in zip(hypernets(copy.deepcopy(model).to(GPU)), expected, strict=True):
        for p, pair in hypernet().items():
            for one, other in zip(pair, factors[p], strict=True):
                torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-6)


def hypernets(model):
    return [module for module in model.modules() if isinstance(module, hora_torch.hypernet.HoraHypernet)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_leaves_what_it_reports(families, dtype, tmp_path):
    family = families["llama"]
    model, inputs = adapted(family).to(GPU), on_gpu(family.inputs())
    optimizer = torch.optim.AdamW(parameters(model).values(), lr=0.1, fused=True)
    scaler, losses = torch.amp.GradScaler(enabled=dtype == torch.float16, init_scale=256.0), []
    for _ in range(4):
        with torch.autocast("cuda", dtype):
            value = loss(model, inputs)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    agree(evaluate(model, inputs).cpu(), truth(family, written(tmp_path)))


def test_the_trainer_on_a_gpu_reports_and_keeps_what_it_trained(families, tmp_path):
    family = families["llama"]
    tokens = torch.randint(0, 64, (16, 6), generator=torch.Generator().manual_seed(2))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=3,
        bf16=True,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.3,
        report_to="none",
        disable_tqdm=True,
    )
    model = adapted(family, init_weights=True)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(set(losses)) == 3
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else it goes on in bfloat16
    agree(evaluate(model, on_gpu(family.inputs())).cpu(), truth(family, current(host(model))))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["llama", "timm-vit"])
def test_a_compiled_model_trains_and_sees_what_an_update_left(families, name, mode):
    family = families[name]
    model, inputs = adapted(family).to(GPU), on_gpu(family.inputs())
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, mode=mode)
    for _ in range(3):
        for one, call in ((eager, eager), (model, compiled)):
            loss(call, inputs).backward()
            with torch.no_grad():
                for param in parameters(one).values():
                    param -= 0.05 * param.grad / (param.grad.norm() + 1e-6)
                    param.grad = None
        with torch.no_grad():
            agree(output(compiled(**inputs)).clone(), output(eager(**inputs)))
    agree(evaluate(compiled, inputs).cpu(), truth(family, current(host(model))))


def captured(model, inputs):
    """A CUDA graph of one call, and where its output will be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(2):
            model(**inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        found = output(model(**inputs))
    return graph, found


@pytest.mark.parametrize("scoped", [False, True])
def test_a_captured_graph_computes_with_the_parameters_of_its_replay(families, scoped):
    family = families["timm-vit"]  # a language model's masks are made on the processor
    model, inputs = adapted(family).to(GPU), on_gpu(family.inputs())
    if scoped:
        with hora_torch.cached_factors(model):
            evaluate(model, inputs)
            graph, found = captured(model, inputs)
    else:
        graph, found = captured(model, inputs)
    before = evaluate(model, inputs)
    with torch.no_grad():
        for param in parameters(model).values():
            param *= 1.2
    expected = evaluate(model, inputs)
    differ(before, expected)
    junk = [torch.full((1 << 18,), float("nan"), device=GPU) for _ in range(64)]  # over what a closed scope let go
    graph.replay()
    del junk
    agree(found, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_sees_what_an_update_left(families, cache):
    family = families["llama"]
    model, ids = adapted(family).to(GPU), family.inputs()["input_ids"].to(GPU)
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    asked |= {"return_dict_in_generate": True, "attention_mask": torch.ones_like(ids), "cache_implementation": cache}

    def logits(one):
        return torch.stack(one.generate(input_ids=ids, **asked).logits)

    first = logits(model)
    with torch.no_grad():
        for param in parameters(model).values():
            param *= 1.2
    second, merged = logits(model), logits(copy.deepcopy(model).merge_and_unload())
    differ(first[0], second[0])
    agree(second[0], merged[0])


@pytest.mark.parametrize("name", ["llama", "vit", "gpt2"])
def test_a_model_that_is_partly_elsewhere_computes_the_same(families, name, tmp_path):
    family = families[name]
    model = adapted(family)
    expected = evaluate(model, family.inputs())
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    places = {key.rpartition(".")[0]: "cpu" if ".1." in key else 0 for key, _ in held}
    accelerate.dispatch_model(model, places, main_device=0, offload_dir=str(tmp_path))
    for _ in range(2):
        agree(evaluate(model, family.inputs()).cpu(), expected)


def test_a_model_without_data_is_filled_on_the_gpu(families, tmp_path):
    family = families["llama"]
    model = adapted(family)
    expected = evaluate(model, family.inputs())
    model.save_pretrained(tmp_path / "adapter")
    family.model().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": 0})
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        agree(evaluate(loaded, on_gpu(family.inputs())).cpu(), expected)


def test_samples_get_their_own_adapters(families):
    family = families["llama"]
    model = adapted(family).to(GPU)
    model.add_adapter("other", config())
    inputs = on_gpu(family.inputs())
    names = ["other", "default"]
    with torch.no_grad():
        found = output(model.eval()(**inputs, adapter_names=names))
    for place, name in enumerate(names):
        model.set_adapter(name)
        agree(found[place], evaluate(model, inputs)[place])


def test_fully_sharded_on_one_gpu_trains_as_one(families, tmp_path):
    from torch.distributed.fsdp import fully_shard

    family = families["llama"]
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        alone, model = (adapted(family).to(GPU) for _ in range(2))
        for module in model.modules():
            if isinstance(module, nn.Module) and type(module).__name__ == "LlamaDecoderLayer":
                fully_shard(module)
        fully_shard(model)
        inputs = on_gpu(family.inputs())
        for one in (alone, model):
            optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.05)
            for _ in range(2):
                loss(one, inputs).backward()
                optimizer.step()
                optimizer.zero_grad()
        agree(evaluate(model, inputs), evaluate(alone, inputs))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_on_the_gpu_trains_exports_and_merges(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    save_float_model(tmp_path)
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    asked = transformers.BitsAndBytesConfig(**(options if bits == 4 else {"load_in_8bit": True}))
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={"": 0}, dtype=torch.float32, quantization_config=asked
    )
    inputs = on_gpu(tokens())
    bare = evaluate(base, inputs)
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(base), config(hora_alpha=0.2))
    rounding = 0.05 if bits == 8 else 1e-3
    optimizer = torch.optim.AdamW(parameters(model).values(), lr=1e-2)
    for _ in range(3):
        loss(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted_output = evaluate(model, inputs)
    assert (adapted_output - bare).norm() > 0.02
    with model.disable_adapter():
        torch.testing.assert_close(evaluate(model, inputs), bare, rtol=rounding, atol=rounding)
    hora_torch.export_lora(model, tmp_path / "lora")
    model.save_pretrained(tmp_path / "hora")
    for folder in ("lora", "hora"):
        fresh = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map={"": 0}, dtype=torch.float32, quantization_config=asked
        )
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / folder)
        torch.testing.assert_close(evaluate(loaded, inputs), adapted_output, rtol=rounding, atol=rounding)
