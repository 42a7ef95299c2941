"""One op, four descriptions: schema, function, specification and direct door agree word for word."""

import inspect
import re

import pytest
import torch
from op_cases import CASES, DIRECT, compiled

from unlearn_ext import ops
from unlearn_ext.ops import reference

SCHEMAS = {
    text.partition("(")[0]: torch._C.parse_schema("unlearn_ext::" + text)
    for text in ops.build_info()["schemas"]
}
NAMES = sorted({name.partition(".")[0] for name in SCHEMAS})

each_name = pytest.mark.parametrize("name", NAMES)
each_schema = pytest.mark.parametrize("name", SCHEMAS)


def _parameters(schema):
    """Arguments of a schema as ``(name, keyword only, default)``."""
    return [
        (argument.name, argument.kwarg_only, argument.default_value if argument.has_default_value() else None)
        for argument in schema.arguments
    ]


def _signature(function):
    return [
        (
            parameter.name,
            parameter.kind is inspect.Parameter.KEYWORD_ONLY,
            None if parameter.default is inspect.Parameter.empty else parameter.default,
        )
        for parameter in inspect.signature(function).parameters.values()
    ]


def test_every_schema_has_a_function_a_specification_and_a_case():
    assert sorted(set(ops.__all__) - {"build_info"}) == NAMES
    assert sorted(reference.__all__) == NAMES
    assert {case.schema for case in CASES} == set(SCHEMAS)
    assert len(CASES) == len(SCHEMAS)


@compiled
def test_the_direct_door_gives_out_the_same_names():
    public = {name for name in dir(DIRECT) if not name.startswith("_")}
    assert public - {"build_info"} == set(NAMES)


@each_name
def test_functions_have_the_arguments_of_their_schema(name):
    assert _signature(getattr(ops, name)) == _parameters(SCHEMAS[name])


@each_name
def test_specifications_have_the_signature_of_their_function(name):
    assert inspect.signature(getattr(reference, name)) == inspect.signature(getattr(ops, name))


@each_schema
def test_overloads_differ_in_types_alone(name):
    def shape(schema):
        return [(keyword, default) for _, keyword, default in _parameters(schema)]

    assert shape(SCHEMAS[name]) == shape(SCHEMAS[name.partition(".")[0]])


@each_schema
def test_the_dispatcher_holds_the_schemas_of_the_list(name):
    stem, _, overload = name.partition(".")
    registered = getattr(getattr(torch.ops.unlearn_ext, stem), overload or "default")
    assert str(registered._schema) == str(SCHEMAS[name])
    assert torch.Tag.pt2_compliant_tag in registered.tags


@compiled
@each_schema
def test_the_direct_door_has_the_arguments_of_the_schema(name):
    text = getattr(DIRECT, name.partition(".")[0]).__doc__
    signatures = re.findall(r"^(?:\d+\. )?\w+\((.*)\) -> ", text, flags=re.M)
    # Types may hold commas, but only names are followed by a colon.
    found = [re.findall(r"(?:^|, )(\*|\w+)(?=: |,|$)", signature) for signature in signatures]
    schema, wanted = SCHEMAS[name], []
    for argument in schema.arguments:
        if argument.kwarg_only and "*" not in wanted:
            wanted.append("*")
        wanted.append(argument.name)
    assert wanted in found


@each_name
def test_ops_that_end_in_an_underscore_return_nothing_and_the_others_write_nothing(name):
    for schema in (s for n, s in SCHEMAS.items() if n.partition(".")[0] == name):
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        assert bool(written) == name.endswith("_")
        assert (len(schema.returns) == 0) == name.endswith("_")


@each_name
def test_docstrings_name_every_argument_and_section(name):
    function = getattr(ops, name)
    text = inspect.getdoc(function)
    first, blank, *_ = text.splitlines()
    assert first.endswith(".")
    assert not blank
    arguments = text.partition("Args:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^    (\w+): ", arguments, flags=re.M) == list(inspect.signature(function).parameters)
    sections = ["Args:", "Raises:", "Source:", "Example:"]
    if not name.endswith("_"):
        sections.insert(1, "Returns:")
    assert [line for line in text.splitlines() if line in {*sections, "Returns:"}] == sections
    assert ">>> " in text.partition("Example:")[2]


def test_build_info_describes_the_build():
    info = ops.build_info()
    assert info["torch"] == torch.__version__
    assert isinstance(info["cuda"], bool)
    assert isinstance(info["cuda_reason"], str)
    assert isinstance(info["cuda_architectures"], list)
    assert info["cpu_capability"] in info["cpu_capabilities"]
    possible = {"compiled": {"amx", "avx512_bf16", "avx512", "avx2", "baseline"}, "reference": {"reference"}}
    assert set(info["cpu_capabilities"]) <= possible[info["kernels"]]
    assert (info["reason"] == info["mend"] == "") == (info["kernels"] == "compiled")
    assert {"version", "python", "compiler", "schemas"} <= set(info)
