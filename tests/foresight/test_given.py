"""Models and texts that lie here: what is known to fail is found, and what would run is let alone."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libprune.foresight import given as foresight
from libprune.foresight.given import given_faults
from libprune.pipeline.params import validate_params
from tests.support.params import untrained
from tests.support.tiny import write_text


@pytest.fixture
def told(tmp_path, monkeypatch):
    """The texts of the faults of a project with a text, of a hub model, and changes by section."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")

    def of(**changes: dict[str, Any]) -> list[str]:
        data = untrained()
        usual: dict[str, dict[str, Any]] = {"prepare": {"model": "owner/model"}, "tokenize": {"text": "text.txt"}}
        filled = {
            key: value | usual.get(key, {}) | changes.get(key, {}) if isinstance(value, dict) else value
            for key, value in data.items()
        }
        return [fault.text for fault in given_faults(validate_params(filled, ""))]

    return of


def write_config(folder: Path, **config: Any) -> str:
    """A folder with a config and a file of weights that nobody reads."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    return str(folder)


def test_of_the_hub_nothing_is_said(told):
    assert (
        told(tokenize={"text": "owner/text", "column": "body"}, recover={"method": "full", "teacher": "owner/t"}) == []
    )
    assert told(tokenize={"text": "wikitext2", "split": "train", "evaluation_text": "ptb"}) == []
    assert told(tokenize={"text": "self"}) == []


@pytest.mark.parametrize("key", ["prepare.model", "tokenize.text", "tokenize.evaluation_text", "recover.teacher",
                                 "recover.text", "evaluate.task_folder"])  # fmt: skip
@pytest.mark.parametrize("missing", ["./nowhere", "none", "package://no_such_package/x"])
def test_what_is_not_there_is_found_under_its_key_and_nothing_else(told, key, missing):
    section, name = key.split(".")
    changes: dict[str, Any] = {"recover": {"method": "full"}}
    changes[section] = {**changes.get(section, {}), name: missing}
    (fault,) = told(**changes)
    assert fault.startswith(key)


def test_a_teacher_and_a_text_to_train_on_count_only_where_there_is_training(told):
    assert told(recover={"method": "none", "teacher": "./nowhere", "text": "./nowhere"}) == []


def test_what_is_no_model_is_found(told, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gguf").write_text("not one")
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    pickled = Path(write_config(tmp_path / "pickled", model_type="llama"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for model, message in {
        "./empty": "is a folder without a config.json",
        "./model.gguf": "no GGUF file",
        "./lora": "is a LoRA adapter",
        "./pickled": "no .safetensors file but pytorch_model.bin, a pickle",
        write_config(tmp_path / "odd", model_type="lama"): "no family file describes model_type 'lama'",
        write_config(
            tmp_path / "q", model_type="llama", quantization_config={"quant_method": "awq"}
        ): "quantized (awq)",
    }.items():
        for key in ("prepare.model", "recover.teacher"):
            section, name = key.split(".")
            (fault,) = told(**{section: {name: model, **({"method": "full"} if section == "recover" else {})}})
            assert fault.startswith(key) and message in fault


@pytest.mark.parametrize("stored", [{}, {"quant_method": "mxfp4"}, {"quant_method": "fp8"}])
def test_a_known_model_has_no_fault(told, tmp_path, stored):
    """Formats that transformers dequantises are no fault either."""
    more = {"quantization_config": stored} if stored else {}
    assert told(prepare={"model": write_config(tmp_path / "m", model_type="llama", num_hidden_layers=4, **more)}) == []


def test_lengths_beyond_learned_positions_are_found_and_others_are_not(told, tmp_path):
    gpt2 = write_config(tmp_path / "gpt2", model_type="gpt2", n_positions=128, architectures=["GPT2LMHeadModel"])
    found = told(prepare={"model": gpt2}, recover={"method": "full"})
    assert [fault.partition(" =")[0] for fault in found] == [
        "tokenize.evaluation_length",
        "evaluate.prompt_tokens + evaluate.decode_tokens",
        "recover.length",
    ]
    llama = write_config(tmp_path / "llama", model_type="llama", max_position_embeddings=128)
    assert told(prepare={"model": llama}) == []


def test_what_this_model_cannot_do_is_found(told, tmp_path):
    bert = write_config(tmp_path / "bert", model_type="bert", architectures=["BertForMaskedLM"])
    found = told(prepare={"model": bert}, evaluate={"tasks": ["piqa"]}, export={"formats": ["gguf"]})
    assert len(found) == 2 and "questions to models that write" in found[0] and "no GGUF file" in found[1]
    llama = write_config(tmp_path / "llama", model_type="llama", num_hidden_layers=4)
    (fault,) = told(prepare={"model": llama}, allocate={"freeze_first": 2, "freeze_last": 2})
    assert "keep all 4 layers" in fault
    assert told(prepare={"model": llama}, allocate={"freeze_first": 2, "freeze_last": 1}) == []
    gemma = write_config(tmp_path / "opt", model_type="olmo2")
    assert told(prepare={"model": gemma}, allocate={"depth": "none"}) == []


def test_what_a_model_that_gives_embeddings_cannot_learn_is_found(told, tmp_path):
    model = write_config(tmp_path / "bert", model_type="bert", architectures=["BertModel"])
    learns = {"method": "full", "top_k": 8, "cross_entropy": 0.5}
    found = told(prepare={"model": model}, recover=learns)
    assert [fault.partition(" is of predicted tokens")[0] for fault in found] == [
        "recover.top_k",
        "recover.cross_entropy",
    ]
    assert told(prepare={"model": model}, recover=learns | {"method": "none"}) == []
    written = write_config(tmp_path / "gpt2", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    assert told(prepare={"model": written}, recover=learns) == []


def test_what_a_language_model_inside_another_cannot_do_is_found(told, tmp_path):
    nested = {"model_type": "qwen3_vl_text", "num_hidden_layers": 4}
    seeing = write_config(
        tmp_path / "vl", model_type="qwen3_vl", architectures=["Qwen3VLForConditionalGeneration"], text_config=nested
    )
    usual = {"method": "uniform", "shape": "auto", "freeze_first": 0, "freeze_last": 0}

    def asked(**changes: Any) -> list[str]:
        return told(prepare={"model": seeing}, allocate=usual | {"depth": "none"} | changes)

    assert asked() == []
    assert asked(method="search", shape="uniform") == []
    for changes, message in {
        ("method", "global"): "allocate.method: global decides each layer's own width",
        ("method", "search"): "allocate.method: search decides each layer's own width",
        ("shape", "per_layer"): "allocate.shape: per_layer gives layers widths of their own",
        ("freeze_last", 1): "allocate.freeze_last keeps layers wider than the others",
        ("depth", "units"): "can be deleted: image features are added behind layers by their number",
    }.items():
        (fault,) = asked(**dict([changes]))
        assert message in fault
        assert "qwen3_vl" in fault
    found = told(prepare={"model": seeing}, allocate=usual, export={"formats": ["gguf", "onnx", "openvino"]})
    assert [fault.partition(",")[0] for fault in found] == [
        f"export.formats has {kind}" for kind in ("gguf", "onnx", "openvino")
    ]
    llama = write_config(tmp_path / "vl", model_type="mistral3", text_config="none", architectures=3)
    assert told(prepare={"model": llama}, allocate=usual) == []


@pytest.mark.parametrize(("sharing", "number"), [(2, 1), (0, 0)])
def test_layers_that_use_the_keys_of_others_are_written_alike(told, tmp_path, sharing, number):
    model = write_config(tmp_path / "gemma", model_type="gemma4_text", num_kv_shared_layers=sharing)
    faults = told(prepare={"model": model}, allocate={"method": "search", "shape": "auto"})
    assert ["the layers of a gemma4_text model can only be written all alike" in fault for fault in faults] == (
        [True] * number
    )


WRITERS = {
    "jsonl": lambda path: path.write_text('{"body": "a", "n": 1}\n{"body": "b", "n": 2}\n'),
    "json": lambda path: path.write_text('[{"body": "a", "n": 1}]'),
    "csv": lambda path: path.write_text("body,n\na,1\n"),
    "tsv": lambda path: path.write_text("body\tn\na\t1\n"),
    "parquet": lambda path: pq.write_table(pa.table({"body": ["a"], "n": [1]}), path),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("key", ["text", "evaluation_text", "recover"])
def test_a_column_that_is_not_there_is_found_with_those_that_are(told, tmp_path, kind, key):
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path)

    def asked(column: str | None) -> list[str]:
        if key == "recover":
            shares = [{"text": str(path), "share": 1.0, "column": column}]
            return told(recover={"method": "full", "text": shares})
        return told(tokenize={key: str(path), key.replace("text", "column"): column})

    assert asked("body") == []
    for column in (None, "bdoy"):
        (fault,) = asked(column)
        assert fault.endswith(f"has no column '{column or 'text'}'; it has body, n")


def test_a_column_that_may_still_come_is_no_fault(told, tmp_path, monkeypatch):
    monkeypatch.setattr(foresight, "ROWS", 3)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' * 3 + '{"text": "late"}\n')
    assert told(tokenize={"text": str(path)}) == []
    path.write_text('{"a": 1}\n' * 3)
    assert len(told(tokenize={"text": str(path)})) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": 3}\n', "holds int, not text"),
        ("a.jsonl", '{"text": null}\n{"text": 3.5}\n', "holds float, not text"),
        ("a.jsonl", '{"text": \n', "cannot be read as json lines: line 1"),
        ("a.jsonl", "", "holds no document"),
        ("a.csv", "text,n\n", "holds no document"),
        ("a.pdf", "x", "has no ending that is known"),
        ("a.parquet", "x", "cannot be read as parquet"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
)
def test_a_text_that_cannot_be_read_is_found(told, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    (fault,) = told(tokenize={"text": name})
    assert fault.startswith("tokenize.text: ") and message in fault


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "./nowhere"}, "prepare.vocabulary.text: .*does not exist"),
        ({"text": "none"}, "prepare.vocabulary = 'none' is the name of no source; write null"),
        ({"text": "self"}, "prepare.vocabulary.text: self is written by the model"),
        ({"text": "c4"}, "prepare.vocabulary.text: c4 has no end"),
        ({"text": "./text.txt", "column": "body"}, "prepare.vocabulary.column: text './text.txt' has no column 'body'"),
    ],
)
def test_a_text_whose_tokens_cannot_stay_is_found(told, given, message):
    (fault,) = told(prepare={"vocabulary": given})
    assert re.match(message, fault)


def test_a_text_whose_tokens_stay_may_be_that_of_the_calibration(told):
    assert told(prepare={"vocabulary": {"text": "./text.txt"}}) == []


def test_conversations_are_text(told, tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"text": [{"role": "user", "content": "x"}]}\n')
    assert told(tokenize={"text": "chat.jsonl"}) == []


def test_keys_of_the_hub_are_found_on_a_text_that_lies_here(told):
    found = told(tokenize={"split": "train", "config": "en"})
    assert [fault.partition(" ")[0] for fault in found] == ["tokenize.config", "tokenize.split"]
    (fault,) = told(tokenize={"evaluation_split": "test"})
    assert fault.startswith("tokenize.evaluation_split is for data sets of the hub")
    assert told(tokenize={"evaluation_split": "test", "evaluation_text": "owner/text"}) == []
    (fault,) = told(tokenize={"text": [{"text": "text.txt", "share": 1.0, "revision": "v1"}]})
    assert fault.startswith("tokenize.text[0].revision is for data sets of the hub")
    (fault,) = told(prepare={"vocabulary": {"text": "text.txt", "split": "train"}})
    assert fault.startswith("prepare.vocabulary.split is for data sets of the hub")


def test_a_revision_is_found_on_a_model_that_lies_here(told, tmp_path):
    model = write_config(tmp_path / "model", model_type="llama")
    (fault,) = told(prepare={"model": model, "revision": "main"})
    assert (
        fault == f"prepare.revision is for models of the hub, and prepare.model = '{model}' lies here; set it to null"
    )
    assert told(prepare={"revision": "main"}) == []


def test_the_text_to_calibrate_on_is_found_as_that_to_evaluate_on(told):
    (fault,) = told(tokenize={"evaluation_text": "./text.txt"})
    assert "is the text to calibrate on" in fault


def test_labels_are_looked_for_where_the_model_tells_classes_apart(told, tmp_path):
    (tmp_path / "rows.csv").write_text("text,stars\na,1\n")
    model = write_config(tmp_path / "m", model_type="bert", architectures=["BertForSequenceClassification"])
    asked = {"prepare": {"model": model}, "tokenize": {"text": "rows.csv"}}
    (fault,) = told(**asked)
    assert "has no column 'label'; it has text, stars" in fault
    assert told(**asked | {"tokenize": {"text": "rows.csv", "label_column": "stars"}}) == []


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([1]) | st.just({"a": 1})
KEYS = ("model_type", "architectures", "quantization_config", "auto_map", "num_hidden_layers", "n_positions", "n_layer")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), JSON), st.sampled_from(["llama", "gpt2", "bert", None]))
def test_a_config_of_any_content_is_told_or_let_alone(told, tmp_path, config, kind):
    known = {} if kind is None else {"model_type": kind, "architectures": ["AForSequenceClassification"]}
    told(prepare={"model": write_config(tmp_path / "m", **known | config)}, export={"formats": ["gguf"]})


def test_a_config_that_is_no_json_is_told(told, tmp_path):
    folder = Path(write_config(tmp_path / "m"))
    for content in (b"[1]", b"{", b"\xff", b"3"):
        (folder / "config.json").write_bytes(content)
        (fault,) = told(prepare={"model": str(folder)})
        assert fault.startswith("prepare.model: ") and "config.json cannot be read" in fault


def test_each_of_several_texts_is_looked_at(told, tmp_path):
    write_text(tmp_path / "other.txt")
    (tmp_path / "rows.csv").write_text("body\na\n")

    def texts(name: str, **keys: str) -> list[dict[str, Any]]:
        return [{"text": "text.txt", "share": 0.5}, {"text": name, "share": 0.5, **keys}]

    for good in (texts("other.txt"), texts("self"), texts("owner/text"), texts("rows.csv", column="body")):
        assert told(tokenize={"text": good}) == []
    (fault,) = told(tokenize={"text": texts("./nowhere.txt")})
    assert fault.startswith("tokenize.text: ./nowhere.txt does not exist")
    (fault,) = told(tokenize={"text": texts("rows.csv", column="text")})
    assert fault.startswith("tokenize.text[1].column: text 'rows.csv' has no column 'text'; it has body")
    (fault,) = told(tokenize={"text": texts("other.txt"), "evaluation_text": "other.txt"})
    assert "the text to evaluate on is the text to calibrate on" in fault
    model = write_config(tmp_path / "m", model_type="bert", architectures=["BertForSequenceClassification"])
    faults = told(prepare={"model": model}, tokenize={"text": texts("owner/text")})
    assert faults[0] == "tokenize.text lists several texts, but a model that tells classes apart takes one; name one"
