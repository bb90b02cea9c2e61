"""QuantizeConfig: what may be asked for, and what survives a trip through the config files of others."""

import dataclasses
import json
import logging
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptq_triton import QuantizeConfig
from gptq_triton.config import REFUSED_FORMATS, SYNONYMS

OWN = {f.name for f in dataclasses.fields(QuantizeConfig)}
WRITTEN = OWN | set(SYNONYMS) | {"quant_method", "zero_point", "version", "pack_dtype", "meta", "is_marlin_format"}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
overrides = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.sampled_from([2, 3, 4, 8]),
        "group_size": st.sampled_from([-1, 1, 32, 128]),
        "sym": st.booleans(),
        "desc_act": st.booleans(),
        "damp_percent": st.floats(1e-6, 1),
    },
)
names = st.sampled_from(["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "lm_head", "h.11.c_fc"])
patterns = st.sampled_from(
    [r".*down_proj", r"model\.layers\.0\.", r".*\.1\.", r"down_proj", r"lm_head", r".*(?:q|k)_proj", r"h\.\d+\.c_fc$"]
)
dynamics = st.dictionaries(st.tuples(st.sampled_from(["", "+:", "-:"]), patterns).map("".join), overrides, max_size=4)


@st.composite
def configs(draw, extra=True):
    unknown = st.dictionaries(st.text(max_size=8).filter(lambda key: key not in WRITTEN), json_values, max_size=3)
    return QuantizeConfig(
        bits=draw(st.sampled_from([2, 3, 4, 8])),
        group_size=draw(st.sampled_from([-1, 1, 16, 128, 1000])),
        sym=draw(st.booleans()),
        desc_act=draw(st.booleans()),
        static_groups=draw(st.booleans()),
        group_aware=draw(st.booleans()),
        damp_percent=draw(st.floats(1e-9, 1)),
        true_sequential=draw(st.booleans()),
        **draw(st.sampled_from([{}, {"mse": True}, {"clip": True}])),
        refine=draw(st.integers(0, 3)),
        lm_head=draw(st.booleans()),
        dynamic=draw(dynamics),
        checkpoint_format=draw(st.sampled_from(["", "gptq", "gptq_v2"])),
        extra=draw(unknown) if extra else {},
    )


@given(configs())
def test_a_config_survives_its_file(config):
    written = json.loads(json.dumps(config.to_dict()))
    read = QuantizeConfig.from_dict(written)
    assert read.to_dict() == written
    for name in OWN - {"extra", "desc_act"}:
        assert getattr(read, name) == getattr(config, name), name
    assert read.desc_act == (config.desc_act and not config.static_groups)  # what readers need to know
    assert {key: written[key] for key in config.extra} == config.extra
    for name in ("bits", "group_size", "sym", "damp_percent", "true_sequential", "lm_head", "checkpoint_format"):
        assert written[name] == getattr(config, name)


@given(
    configs(extra=False),
    st.dictionaries(st.text(max_size=8).filter(lambda key: key not in WRITTEN), json_values, max_size=4),
    st.dictionaries(st.text(max_size=8).filter(lambda key: key not in WRITTEN), json_values, max_size=4),
)
def test_unknown_fields_of_others_are_kept_verbatim(config, unknown, about):
    """transformers' own GPTQConfig drops these on a load and resave."""
    fields = config.to_dict() | unknown
    fields["meta"] = fields["meta"] | about
    fields["meta"]["quantizer"] = ["gptqmodel:5.0.0"]
    written = QuantizeConfig.from_dict(fields).to_dict()
    assert written == fields


@given(configs(extra=False), st.data())
def test_synonyms(config, data):
    fields = config.to_dict()
    renamed = dict(fields)
    for old, new in data.draw(st.permutations(list(SYNONYMS.items()))):
        if new in renamed and data.draw(st.booleans()):
            renamed[old] = renamed.pop(new)
    if data.draw(st.booleans()):
        renamed["zero_point"] = not renamed.pop("sym")
    read, plain = QuantizeConfig.from_dict(renamed), QuantizeConfig.from_dict(fields)
    assert dataclasses.replace(read, extra={}) == dataclasses.replace(plain, extra={})
    assert renamed.items() <= read.to_dict().items()


def test_gptqmodel_keeps_how_it_quantized_in_meta():
    """As GPTQModel 5 writes it."""
    fields = {
        "bits": 4,
        "dynamic": {"-:.*mlp\\.gate$": {}, "+:.*down_proj": {"bits": 8, "group_size": 32}},
        "group_size": 128,
        "desc_act": False,
        "lm_head": False,
        "quant_method": "gptq",
        "sym": True,
        "format": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {
            "quantizer": ["gptqmodel:5.4.0"],
            "damp_percent": 0.05,
            "static_groups": False,
            "true_sequential": True,
            "mse": 2.4,
            "act_group_aware": False,
            "v2_alpha": 0.25,
        },
    }
    config = QuantizeConfig.from_dict(fields)
    assert (config.damp_percent, config.true_sequential, config.mse, config.group_aware) == (0.05, True, True, False)
    written = config.to_dict()
    assert all(written[key] == value for key, value in fields.items() if key != "meta")
    assert written["meta"] == fields["meta"] | {"group_aware": False}
    changed = dataclasses.replace(config, checkpoint_format="gptq_v2", mse=False).to_dict()
    assert (changed["format"], changed["checkpoint_format"], changed["meta"]["mse"]) == ("gptq_v2", "gptq_v2", False)


def test_autogptq_file():
    fields = {
        "bits": 4,
        "group_size": -1,
        "damp_percent": 0.01,
        "desc_act": True,
        "static_groups": False,
        "sym": False,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "gptq_model-4bit-128g",
    }
    config = QuantizeConfig.from_dict(fields)
    assert (config.group_size, config.sym, config.desc_act) == (-1, False, True)
    assert config.checkpoint_format == "gptq"  # a file that does not say is v1, symmetric or not
    written = config.to_dict()
    assert fields.items() <= written.items()
    assert written["checkpoint_format"] == "gptq"


@given(dynamics, names, configs(extra=False))
def test_rules_apply_as_gptqmodel_applies_them(dynamic, name, config):
    """The first pattern that matches from the start of the name decides; "-:" means: leave alone."""
    config = dataclasses.replace(config, dynamic=dynamic)
    got = config.for_module(name)
    for pattern, rule in dynamic.items():
        if re.match(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern, name):
            if pattern.startswith("-:"):
                assert got is None
            else:
                wanted = dataclasses.asdict(config) | rule | {"dynamic": {}}
                assert dataclasses.asdict(got) == wanted
            break
    else:
        assert got == config


def test_rules_take_synonyms_and_warn_of_what_they_cannot_change(caplog):
    config = QuantizeConfig(dynamic={".*": {"wbits": 8, "groupsize": 64, "mse": 2.4}})
    own: Any = config.for_module("x")
    assert (own.bits, own.group_size, own.mse) == (8, 64, True)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        config = QuantizeConfig(dynamic={".*down": {"bit": 8, "adapter": {"rank": 4}, "desc_act": True}})
    assert len(caplog.records) == 1
    assert "'.*down' sets bit, adapter, which is ignored" in caplog.text
    assert config.to_dict()["dynamic"] == {".*down": {"bit": 8, "adapter": {"rank": 4}, "desc_act": True}}
    nothing: Any = None  # what a file may hold
    assert QuantizeConfig(dynamic={"-:x": nothing}).to_dict()["dynamic"] == {"-:x": {}}


@pytest.mark.parametrize(
    ("sym", "dynamic", "stored"),
    [
        (True, {}, "gptq"),
        (False, {}, "gptq_v2"),
        (True, {".*": {"sym": False}}, "gptq_v2"),
        (True, {"-:.*": {}}, "gptq"),
        (False, {".*": {"sym": True}}, "gptq_v2"),
    ],
)
def test_asymmetric_zero_points_are_stored_as_v2(sym, dynamic, stored):
    assert QuantizeConfig(sym=sym, dynamic=dynamic).checkpoint_format == stored


def test_trivial_groups_are_written_as_desc_act_false():
    """Readers refuse act-order that has no g_idx to show for it."""
    for desc_act, static_groups, written in [(1, 0, True), (1, 1, False), (0, 0, False), (0, 1, False)]:
        config = QuantizeConfig(desc_act=bool(desc_act), static_groups=bool(static_groups))
        assert config.to_dict()["desc_act"] is written


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"bits": 5}, ValueError, r"bits must be one of .*got 5"),
        ({"bits": "4"}, TypeError, r"bits must be an int, got '4'"),
        ({"group_size": 0}, ValueError, r"group_size must be -1 or at least 1, got 0"),
        ({"group_size": None}, TypeError, r"group_size must be an int"),
        ({"sym": "false"}, TypeError, r"sym must be a bool, got 'false'"),
        ({"desc_act": None}, TypeError, r"desc_act must be a bool"),
        ({"damp_percent": 0}, ValueError, r"damp_percent must lie in \(0, 1\], got 0"),
        ({"damp_percent": 1.5}, ValueError, r"damp_percent must lie in \(0, 1\], got 1.5"),
        ({"damp_percent": float("nan")}, ValueError, r"damp_percent must lie in \(0, 1\], got nan"),
        ({"damp_percent": "auto"}, TypeError, r"damp_percent must be a number, got 'auto'"),
        ({"checkpoint_format": "gptq_v3"}, ValueError, r"checkpoint_format must be one of .*got 'gptq_v3'"),
        ({"dynamic": ["x"]}, TypeError, r"dynamic must map regexes to overrides, got \['x'\]"),
        ({"dynamic": {"-:(": {}}}, ValueError, r"dynamic: '-:\(' is not a valid regex"),
        ({"dynamic": {"x": 8}}, TypeError, r"dynamic: 'x' must have an object of overrides, got 8"),
        ({"dynamic": {"+:x": {"bits": 7}}}, ValueError, r"dynamic: '\+:x': bits must be one of .*got 7"),
        ({"dynamic": {"x": {"sym": 1}}}, TypeError, r"dynamic: 'x': sym must be a bool, got 1"),
    ],
)
def test_refusals(fields, error, message):
    with pytest.raises(error, match=message):
        QuantizeConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"no `bits`"),
        ({"bits": 4, "quant_method": "awq"}, r"quant_method is 'awq' \(AWQ\)"),
        ({"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}, r"version is 'GEMM' \(AWQ\)"),
        ({"bits": 4, "quant_method": "bitsandbytes"}, r"quant_method is 'bitsandbytes', which is not a GPTQ"),
        ({"bits": 4, "is_marlin_format": True}, r"is_marlin_format is set.*Marlin"),
        ({"bits": 4, "checkpoint_format": "gptq_marlin"}, r"checkpoint_format must be one of"),
        ({"bits": 4, "format": "gptq_p", "checkpoint_format": "gptq"}, r"format is 'gptq_p' \(.*planar"),
        ({"bits": 4, "pack_dtype": "int16"}, r"pack_dtype must be int32, got 'int16'"),
        *(({"bits": 4, "checkpoint_format": kind}, rf"checkpoint_format is '{kind}' \(") for kind in REFUSED_FORMATS),
    ],
)
def test_other_kinds_of_checkpoints_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantizeConfig.from_dict(fields)


@pytest.mark.parametrize("fields", [[], None, {"bits": 4, "meta": "x"}])
def test_a_config_that_is_no_object(fields):
    with pytest.raises(TypeError, match="must be a JSON object"):
        QuantizeConfig.from_dict(fields)


def test_null_means_default():
    config = QuantizeConfig.from_dict({"bits": 3, "sym": None, "group_size": None, "dynamic": None, "meta": None})
    assert dataclasses.replace(config, extra={}) == QuantizeConfig(bits=3, clip=False, refine=0)


def test_torch_names_of_the_packing_type():
    assert QuantizeConfig.from_dict({"bits": 4, "pack_dtype": "torch.int32"}).bits == 4
