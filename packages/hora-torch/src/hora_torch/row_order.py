"""What is known of fused projections: in which order the rows of one weight belong to q, k and v.

A name such as ``qkv`` proves nothing. The order is that of the class whose ``forward`` splits the output, read in its
source and shown by an oracle: scaling what is said to be q of one head by c and k by 1/c leaves the attention as it
is. Classes are named, never imported.
"""

from collections.abc import Mapping
from types import FunctionType
from typing import NamedTuple

from torch import nn

from hora_torch.order import Order


class By(NamedTuple):
    """An order that depends on an attribute of the attention module."""

    attribute: str
    true: "Known"
    false: "Known"


Known = str | By | None

_QKV: Mapping[str, Known] = {"qkv": "q k v"}
_KV: Mapping[str, Known] = {"kv": "k v"}
_TO_KV: Mapping[str, Known] = {"to_kv": "k v"}
_GPT2: Mapping[str, Known] = {"c_attn": By("is_cross_attention", "k v", "q k v")}
_HEAD_FIRST: Mapping[str, Known] = {"query_key_value": "[head][q k v]"}
_FALCON: Mapping[str, Known] = {
    "query_key_value": By("new_decoder_architecture", "[group][q k v]", By("multi_query", "q k v", "[head][q k v]"))
}
_NO_HEADS: Mapping[str, Known] = {"key": "key:1", "value": "value:1"}
_LATENT_QUERY = "q:num_heads*qk_head_dim"
_LATENT: Mapping[str, Known] = {
    "q_proj": _LATENT_QUERY,
    "q_b_proj": _LATENT_QUERY,
    "kv_b_proj": "[num_heads][k:num_heads*qk_nope_head_dim v:num_heads*v_head_dim]",
}
_GATED: Mapping[str, Known] = {
    "q_proj": "[num_attention_heads][q:num_attention_heads*head_dim gate:num_attention_heads*head_dim]"
}
_UNEQUAL = "[num_heads][q:num_heads*key_dim k:num_heads*key_dim v:num_heads*val_dim]"
_KEY, _VALUE = "num_k_heads*head_k_dim", "num_v_heads*head_v_dim"
_DELTA_RULE: Mapping[str, Known] = {"in_proj_qkv": f"q:{_KEY} k:{_KEY} v:{_VALUE}"}
_SEPARATE_DELTA_RULE: Mapping[str, Known] = {"q_proj": f"q:{_KEY}", "k_proj": f"k:{_KEY}", "v_proj": f"v:{_VALUE}"}
_LINEAR: Mapping[str, Known] = {f"{p}_proj": f"{p}:num_heads*head_dim" for p in "qkv"}
_STATE_SPACE: Mapping[str, Known] = {
    "in_proj": "z:num_heads*head_dim x:num_heads*head_dim b:n_groups*ssm_state_size c:n_groups*ssm_state_size "
    "dt:num_heads*1"
}
_TWO_MAPS = "q:num_heads*2*head_dim k:num_heads*2*head_dim v:num_heads*2*head_dim"  # which share a head
_TWICE = "q:heads*dim_heads q2:heads*dim_heads k:heads*dim_heads k2:heads*dim_heads v:heads*dim_heads"  # maps
_BESIDE_AN_MLP = "mlp:1*in_split.0 q:num_heads/in_split.1 k:num_heads/in_split.2 v:num_heads/in_split.3"
_FUSED_LATER: Mapping[str, Known] = {"to_qkv": "q k v", "to_kv": "k v", "to_added_qkv": "q k v", "to_added_kv": "k v"}

_TRANSFORMERS: Mapping[str, Mapping[str, Known]] = {
    # separate projections, whose rows a MultiheadAttention mixes before it splits them into heads
    "aria.modeling_aria.AriaCrossAttention": {f"{p}_proj": f"{p}_proj:1" for p in "qkv"},
    "axk1.modeling_axk1.AXK1Attention": _LATENT,
    "axk2.modeling_axk2.AXK2Attention": {
        **_LATENT,
        "q_gate_proj": "[num_heads][q:num_heads*qk_head_dim gate:num_heads*v_head_dim]",
    },
    "bailing_hybrid.modeling_bailing_hybrid.BailingHybridAttention": _LATENT,
    "bailing_hybrid.modeling_bailing_hybrid.BailingHybridDeltaAttention": _LINEAR,
    "bark.modeling_bark.BarkSelfAttention": {"att_proj": "q k v"},
    "bark.modeling_bark.BarkSelfFlashAttention2": {"att_proj": "q k v"},
    "blip.modeling_blip.BlipAttention": _QKV,
    "blip_2.modeling_blip_2.Blip2Attention": _QKV,
    "bloom.modeling_bloom.BloomAttention": _HEAD_FIRST,
    "codegen.modeling_codegen.CodeGenAttention": {"qkv_proj": "[4][q v k]"},
    "cohere_compass.modeling_cohere_compass.CohereCompassVisionAttention": _QKV,
    "ctrl.modeling_ctrl.MultiHeadAttention": {f"W{p}": f"{p}:num_heads*head_dim" for p in "qkv"},
    "dbrx.modeling_dbrx.DbrxAttention": {"Wqkv": "q k v"},
    "deberta.modeling_deberta.DisentangledSelfAttention": {"in_proj": "[head][q k v]"},
    "decision_transformer.modeling_decision_transformer.DecisionTransformerGPT2Attention": _GPT2,
    "deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVisionAttention": _QKV,
    "deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVisionSdpaAttention": _QKV,
    "deepseek_v2.modeling_deepseek_v2.DeepseekV2Attention": _LATENT,
    "deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention": _LATENT,
    "deepseek_v32.modeling_deepseek_v32.DeepseekV32Attention": _LATENT,
    "deepseek_v4.modeling_deepseek_v4.DeepseekV4Attention": {
        "q_b_proj": "q:num_heads*head_dim",
        "kv_proj": "kv:1*head_dim",
    },
    **{
        f"deepseek_v4.modeling_deepseek_v4.DeepseekV4{cls}": {"kv_proj": "kv_proj:1"}
        for cls in ("CSACompressor", "HCACompressor", "Indexer")
    },
    "dots3_note.modeling_dots3_note.Dots3NoteTextAttention": _LATENT,
    "dots3_note.modeling_dots3_note.Dots3NoteVisionAttention": _QKV,
    "ernie4_5_vl_moe.modeling_ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention": _QKV,
    "esm.modeling_esmfold.EsmFoldInvariantPointAttention": {
        "linear_q": "q:num_heads*hidden_dim",
        "linear_kv": "[num_heads][k:num_heads*hidden_dim v:num_heads*hidden_dim]",
    },
    "esm.modeling_esmfold.EsmFoldSelfAttention": {"proj": "[head][q k v]"},
    "evolla.modeling_evolla.EvollaSequenceCompressorAttention": _TO_KV,
    "exaone4_5.modeling_exaone4_5.Exaone4_5_VisionAttention": _QKV,
    "falcon.modeling_falcon.FalconAttention": _FALCON,
    "falcon.modeling_falcon.FalconFlashAttention2": _FALCON,
    "florence2.modeling_florence2.Florence2VisionChannelAttention": _QKV,
    "florence2.modeling_florence2.Florence2VisionWindowAttention": _QKV,
    "funnel.modeling_funnel.FunnelRelMultiheadAttention": {f"{p}_head": f"{p}:n_head*d_head" for p in "qkv"},
    "glm4_moe_lite.modeling_glm4_moe_lite.Glm4MoeLiteAttention": _LATENT,
    "glm4v.modeling_glm4v.Glm4vVisionAttention": _QKV,
    "glm4v_moe.modeling_glm4v_moe.Glm4vMoeVisionAttention": _QKV,
    "glm5_next.modeling_glm5_next.Glm5NextTextAttention": _LATENT,
    "glm5_next.modeling_glm5_next.Glm5NextVisionAttention": _QKV,
    "glm_image.modeling_glm_image.GlmImageVisionAttention": _QKV,
    "glm_moe_dsa.modeling_glm_moe_dsa.GlmMoeDsaAttention": _LATENT,
    "glm_ocr.modeling_glm_ocr.GlmOcrVisionAttention": _QKV,
    "got_ocr2.modeling_got_ocr2.GotOcr2VisionAttention": _QKV,
    "gpt2.modeling_gpt2.GPT2Attention": _GPT2,
    # with is_cross_attention its forward always fails
    "gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeAttention": {
        "c_attn": By("is_cross_attention", None, By("multi_query", "q k v", "[head][q k v]"))
    },
    "gpt_neox.modeling_gpt_neox.GPTNeoXAttention": _HEAD_FIRST,
    "gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention": _HEAD_FIRST,
    "granite_speech.modeling_granite_speech.GraniteSpeechConformerAttention": _TO_KV,
    "granite_speech_plus.modeling_granite_speech_plus.GraniteSpeechPlusConformerAttention": _TO_KV,
    "hiera.modeling_hiera.HieraMaskUnitAttention": _QKV,
    "hy_v4.modeling_hy_v4.HYV4Attention": _LATENT,
    "imagegpt.modeling_imagegpt.ImageGPTAttention": _GPT2,
    "instructblip.modeling_instructblip.InstructBlipAttention": _QKV,
    "instructblipvideo.modeling_instructblipvideo.InstructBlipVideoAttention": _QKV,
    "jetmoe.modeling_jetmoe.JetMoeAttention": {"kv_proj": "k v"},
    "kimi_linear.modeling_kimi_linear.KimiLinearAttention": _LATENT,
    "kimi_linear.modeling_kimi_linear.KimiLinearDeltaAttention": _LINEAR,
    "layoutlmv2.modeling_layoutlmv2.LayoutLMv2SelfAttention": {"qkv_linear": "q k v"},
    "levit.modeling_levit.LevitAttention": {
        "queries_keys_values.linear": "[num_attention_heads][q:num_attention_heads*key_dim "
        "k:num_attention_heads*key_dim v:num_attention_heads*attention_ratio*key_dim]"
    },
    "levit.modeling_levit.LevitAttentionSubsample": {
        "queries.linear": "q:num_attention_heads*key_dim",
        "keys_values.linear": "[num_attention_heads][k:num_attention_heads*key_dim "
        "v:num_attention_heads*attention_ratio*key_dim]",
    },
    "longcat_flash.modeling_longcat_flash.LongcatFlashMLA": _LATENT,
    "mgp_str.modeling_mgp_str.MgpstrAttention": _QKV,
    "minicpm3.modeling_minicpm3.MiniCPM3Attention": _LATENT,
    "minimax.modeling_minimax.MiniMaxLightningAttention": {
        "qkv_proj": "[num_attention_heads][q:num_attention_heads*head_dim k:num_attention_heads*head_dim "
        "v:num_attention_heads*head_dim]"
    },
    "mistral4.modeling_mistral4.Mistral4Attention": _LATENT,
    "mistral_large4.modeling_mistral_large4.MistralLarge4TextAttention": _LATENT,
    "modernbert.modeling_modernbert.ModernBertAttention": {"Wqkv": "q k v"},
    "mpt.modeling_mpt.MptAttention": {"Wqkv": "q k v"},
    "olmo_hybrid.modeling_olmo_hybrid.OlmoHybridGatedDeltaNet": _SEPARATE_DELTA_RULE,
    "openai.modeling_openai.Attention": {"c_attn": "q k v"},
    "persimmon.modeling_persimmon.PersimmonAttention": _HEAD_FIRST,
    "phi3.modeling_phi3.Phi3Attention": {"qkv_proj": "q k v"},
    "phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalAttention": {"qkv_proj": "q k v"},
    "pp_formulanet.modeling_pp_formulanet.PPFormulaNetVisionAttention": _QKV,
    "pp_ocrv5_mobile_rec.modeling_pp_ocrv5_mobile_rec.PPOCRV5MobileRecAttention": _QKV,
    "pp_ocrv5_server_rec.modeling_pp_ocrv5_server_rec.PPOCRV5ServerRecAttention": _QKV,
    "pp_ocrv6_small_rec.modeling_pp_ocrv6_small_rec.PPOCRV6SmallRecAttention": _QKV,
    "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionAttention": _QKV,
    "qwen2_vl.modeling_qwen2_vl.VisionAttention": _QKV,
    "qwen3_5.modeling_qwen3_5.Qwen3_5Attention": _GATED,
    "qwen3_5.modeling_qwen3_5.Qwen3_5VisionAttention": _QKV,
    "qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeAttention": _GATED,
    "qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeVisionAttention": _QKV,
    "qwen3_next.modeling_qwen3_next.Qwen3NextAttention": _GATED,
    "qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeVisionAttention": _QKV,
    "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionAttention": _QKV,
    "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeVisionAttention": _QKV,
    "qwen4_exp.modeling_qwen4_exp.Qwen4ExpTextAttention": _GATED,
    "qwen4_exp.modeling_qwen4_exp.Qwen4ExpVisionAttention": _QKV,
    "reformer.modeling_reformer.LSHSelfAttention": {"query_key": "qk:num_attention_heads*attention_head_size"},
    "rwkv.modeling_rwkv.RwkvFeedForward": _NO_HEADS,
    "rwkv.modeling_rwkv.RwkvSelfAttention": _NO_HEADS,
    "sam.modeling_sam.SamVisionAttention": _QKV,
    "sam.modeling_sam.SamVisionSdpaAttention": _QKV,
    "sam2.modeling_sam2.Sam2MultiScaleAttention": _QKV,
    "sam_hq.modeling_sam_hq.SamHQVisionAttention": _QKV,
    "sam_hq.modeling_sam_hq.SamHQVisionSdpaAttention": _QKV,
    "seggpt.modeling_seggpt.SegGptAttention": _QKV,
    "slanext.modeling_slanext.SLANeXtVisionAttention": _QKV,
    "timesformer.modeling_timesformer.TimesformerSelfAttention": _QKV,
    "unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVisionAttention": _QKV,
    "unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVisionSdpaAttention": _QKV,
    "vitdet.modeling_vitdet.VitDetAttention": _QKV,
    "xlstm.modeling_xlstm.xLSTMLayer": {
        **{p: f"{p}:num_heads" for p in "qkv"},
        "qkv_opreact": "q:num_heads/qk_dim k:num_heads/qk_dim v:num_heads/v_dim gate:num_heads/v_dim",
    },
    "youtu.modeling_youtu.YoutuAttention": _LATENT,
}

_LINEAR_OR_STATE_SPACE: Mapping[str, Mapping[str, Known]] = {
    "bamba.modeling_bamba.BambaMixer": _STATE_SPACE,
    "falcon_h1.modeling_falcon_h1.FalconH1Mixer": _STATE_SPACE,
    "granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer": _STATE_SPACE,
    "mamba2.modeling_mamba2.Mamba2Mixer": _STATE_SPACE,
    "nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer": _STATE_SPACE,
    "qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet": _DELTA_RULE,
    "qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeGatedDeltaNet": _DELTA_RULE,
    "qwen3_next.modeling_qwen3_next.Qwen3NextGatedDeltaNet": {
        "in_proj_qkvz": f"[num_k_heads][q:{_KEY} k:{_KEY} v:{_VALUE} z:{_VALUE}]"
    },
    "qwen4_exp.modeling_qwen4_exp.Qwen4ExpTextGatedDeltaNet": _DELTA_RULE,
    "zamba2.modeling_zamba2.Zamba2MambaMixer": _STATE_SPACE,
}

_TIMM: Mapping[str, Mapping[str, Known]] = {
    "layers.attention.Attention": _QKV,
    "layers.attention.AttentionRope": _QKV,
    "layers.attention_pool.AttentionPoolLatent": _KV,
    "layers.attention_pool2d.AttentionPool2d": _QKV,
    "layers.attention_pool2d.RotAttentionPool2d": _QKV,
    "layers.diff_attention.DiffAttention": {"qkv": _TWO_MAPS},
    "models.beit.Attention": _QKV,
    "models.cait.TalkingHeadAttn": _QKV,
    "models.coat.FactorAttnConvRelPosEnc": _QKV,
    "models.convit.GPSA": {"qk": "q k"},
    "models.convit.MHSA": _QKV,
    "models.csatv2.SpatialTransformerBlock": _QKV,
    "models.davit.ChannelAttention": _QKV,
    "models.davit.ChannelAttentionV2": _QKV,
    "models.davit.WindowAttention": _QKV,
    "models.edgenext.CrossCovarianceAttn": _QKV,
    "models.efficientformer.Attention": {"qkv": _UNEQUAL},
    "models.eva.EvaAttention": _QKV,
    "models.fastvit.Attention": _QKV,
    "models.gcvit.WindowAttentionGlobal": {"qkv": By("use_global", "k v", "q k v")},
    "models.hiera.MaskUnitAttention": _QKV,
    "models.hieradet_sam2.MultiScaleAttention": _QKV,
    "models.levit.Attention": {"qkv.linear": _UNEQUAL},
    "models.levit.AttentionDownsample": {
        "q.ln.linear": "q:num_heads*key_dim",
        "kv.linear": "[num_heads][k:num_heads*key_dim v:num_heads*val_dim]",
    },
    "models.maxxvit.Attention2d": {"qkv": By("head_first", "[head][q k v]", "q k v")},
    "models.maxxvit.AttentionCl": {"qkv": By("head_first", "[head][q k v]", "q k v")},
    "models.metaformer.Attention": _QKV,
    "models.mobilevit.LinearSelfAttention": {"qkv_proj": "score:1*1 k:1*embed_dim v:1*embed_dim"},
    "models.mvitv2.MultiScaleAttention": _QKV,
    "models.nest.Attention": _QKV,
    "models.pvt_v2.Attention": _KV,
    "models.swin_transformer.WindowAttention": _QKV,
    "models.swin_transformer_v2.WindowAttention": _QKV,
    "models.swin_transformer_v2_cr.WindowMultiHeadAttention": _QKV,
    "models.tiny_vit.Attention": {"qkv": _UNEQUAL},
    "models.tnt.Attention": {"qk": "q k"},
    "models.twins.GlobalSubSampleAttn": _KV,
    "models.twins.LocallyGroupedAttn": _QKV,
    "models.vision_transformer.Attention": _QKV,  # until timm 1.0.20
    "models.vision_transformer.DiffParallelScalingBlock": {"in_proj": _BESIDE_AN_MLP},
    "models.vision_transformer.ParallelScalingBlock": {"in_proj": _BESIDE_AN_MLP},
    "models.vision_transformer_relpos.RelPosAttention": _QKV,
    "models.vision_transformer_sam.Attention": _QKV,
    "models.visformer.Attention": _QKV,
    "models.volo.Attention": _QKV,
    "models.volo.ClassAttention": _KV,
    "models.xcit.XCA": _QKV,
}

_DIFFUSERS: Mapping[str, Mapping[str, Known]] = {
    "attention.AttentionModuleMixin": _FUSED_LATER,
    "attention_processor.Attention": _FUSED_LATER,
    "autoencoders.autoencoder_kl_minimax_h3_audio.MiniMaxH3AudioCausalAttention": _QKV,
    "autoencoders.autoencoder_same.SAMEAttention": {"to_qkv": By("use_differential", _TWICE, "q k v")},
    "embeddings.MochiAttentionPool": _TO_KV,
    "transformers.consisid_transformer_3d.PerceiverAttention": _TO_KV,
    "transformers.consisid_transformer_3d.PerceiverCrossAttention": _TO_KV,
    "transformers.transformer_chronoedit.WanAttention": _FUSED_LATER,
    "transformers.transformer_flux2.Flux2ParallelSelfAttention": {
        "to_qkv_mlp_proj": "q:heads*head_dim k:heads*head_dim v:heads*head_dim mlp:mlp_hidden_dim*mlp_mult_factor"
    },
    "transformers.transformer_helios.HeliosAttention": _FUSED_LATER,
    "transformers.transformer_joyimage.JoyImageAttention": {"img_attn_qkv": "q k v", "txt_attn_qkv": "q k v"},
    "transformers.transformer_joyimage_edit_plus.JoyImageEditPlusAttention": {
        "img_attn_qkv": "q k v",
        "txt_attn_qkv": "q k v",
    },
    "transformers.transformer_prx.PRXAttention": {"img_qkv_proj": "q k v", "txt_kv_proj": "k v"},
    "transformers.transformer_sana_wm.MultiHeadCrossAttention": {"kv_linear": "k v"},
    "transformers.transformer_skyreels_v2.SkyReelsV2Attention": _FUSED_LATER,
    "transformers.transformer_stable_audio3.StableAudio3CrossAttention": {
        "to_q": By("use_differential", "q:heads*dim_heads q2:heads*dim_heads", None),
        "to_kv": By("use_differential", "k:heads*dim_heads k2:heads*dim_heads v:heads*dim_heads", "k v"),
    },
    "transformers.transformer_stable_audio3.StableAudio3SelfAttention": {
        "to_qkv": By("use_differential", _TWICE, "q k v")
    },
    "transformers.transformer_wan.WanAttention": _FUSED_LATER,
    "transformers.transformer_wan_animate.WanAttention": _FUSED_LATER,
    "transformers.transformer_wan_animate_2.WanAnimate2Attention": _FUSED_LATER,
}

_TORCHVISION: Mapping[str, Mapping[str, Known]] = {
    "maxvit.RelativePositionalMultiHeadAttention": {"to_qkv": "q k v"},
    "swin_transformer.ShiftedWindowAttention": _QKV,
    "swin_transformer.ShiftedWindowAttentionV2": _QKV,
    "video.mvit.MultiscaleAttention": _QKV,
    "video.swin_transformer.ShiftedWindowAttention3d": _QKV,
}

ROW_ORDER: Mapping[str, Mapping[str, Known]] = {
    f"{package}.{name}": orders
    for package, known in (
        ("transformers.models", _TRANSFORMERS),
        ("transformers.models", _LINEAR_OR_STATE_SPACE),
        ("timm", _TIMM),
        ("diffusers.models", _DIFFUSERS),
        ("torchvision.models", _TORCHVISION),
    )
    for name, orders in known.items()
}
"""Order of the output rows, by the class that defines ``forward`` and the path, in it, of the module that holds them.

Texts as `Order` reads them.
"""

_WHERE_NAMED = {f"transformers.models.{name}" for name in _LINEAR_OR_STATE_SPACE}


def row_order(attention: nn.Module, own: str) -> Order | None:
    """Order in which the output rows of a linear map belong to projections.

    Parameters
    ----------
    attention
        The module whose ``forward`` splits the output, without adapters.
    own
        Path of the ``Linear`` or ``Conv1D`` in it.

    Returns
    -------
    Order or None
        None where the class is unknown.

    Examples
    --------
    >>> from transformers import GPT2Config
    >>> from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
    >>> row_order(GPT2Attention(GPT2Config(n_embd=8, n_head=2)), "c_attn").names
    ('q', 'k', 'v')
    """
    if "forward" in vars(attention) and not hasattr(
        attention, "_hf_hook"
    ):  # accelerate's forward calls the class's own
        return None
    cls = type(attention)
    order = ROW_ORDER.get(_forward_class(cls), {}).get(own)
    if order is None and getattr(attention, "fused_projections", False):  # diffusers: fused after construction
        order = ROW_ORDER.get(_full_name(_definer(cls, "fuse_projections")), {}).get(own)
    while isinstance(order, By):
        value = getattr(attention, order.attribute, None)
        order = None if value is None else order.true if value else order.false
    return Order.parse(order) if isinstance(order, str) else order


def is_where_named(attention: nn.Module) -> bool:
    """Whether an attention is linear, or a state space, whose heads are adapted where they are named alone."""
    return _forward_class(type(attention)) in _WHERE_NAMED


def _forward_class(cls: type) -> str:
    """Full name of the class that defines ``forward``, or nothing where a subclass changes what it may call."""
    owner = _definer(cls, "forward")
    subclasses = cls.__mro__[: cls.__mro__.index(owner)]
    changed = {name for sub in subclasses for name in _functions(sub)} - {"__init__"}
    return "" if changed & _functions(owner) else _full_name(owner)


def _definer(cls: type, method: str) -> type:
    return next((owner for owner in cls.__mro__ if method in vars(owner)), cls)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _functions(cls: type) -> set[str]:
    return {name for name, value in vars(cls).items() if isinstance(value, FunctionType)}
