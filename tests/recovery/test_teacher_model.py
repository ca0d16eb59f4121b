import pytest
import torch

from libprune.collection import offload
from libprune.collection.offload import pass_bytes
from libprune.engine.describe import describe
from libprune.engine.errors import ArtifactError, ParamsError, SourceError
from libprune.models.folder import load_model
from libprune.models.parallel import World
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import load_params
from libprune.recovery.recover import recover_layout
from libprune.recovery.teacher import teach_layout
from libprune.recovery.teacher_model import described_teacher, load_teacher, settle_teacher, teacher_identity
from tests.support import tiny
from tests.support.recovering import CPU, short

STAGES = ("prepare", "tokenize", "gradients", "hessian", "activations", "ablation", "score", "sensitivity", "levels")


@pytest.fixture(scope="module")
def project(tmp_path_factory, by_forks):
    """A sliced tiny project, and beside it another model with the same vocabulary, whose predictions are sharper."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("project")
    with by_forks():
        tiny.write_project(folder, [*STAGES, "latency", "allocate", "slice"])
    other = tiny.write_model(folder / "other")
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"model.norm.weight": 8 * torch.ones(48)}, other / "model.safetensors", {"format": "pt"})
    return folder


def load(layout: Layout, **changes):
    architecture = read_architecture(layout)
    where = (World(), torch.device("cpu"), torch.float32)
    compute = settle_teacher(architecture, short(**changes), CPU, *where)
    return load_teacher(layout, architecture, short(**changes), compute, *where)


def test_the_dense_model_is_the_teacher_unless_another_is_named(project):
    layout, ids = Layout(project / "artifacts"), torch.arange(2, 10)[None]
    own, other = load(layout), load(layout, teacher=str(project / "other"))
    assert not own.training
    assert not other.training
    with torch.no_grad():
        assert (own(ids).logits - other(ids).logits).abs().max() > 1


def test_a_larger_teacher_is_described_by_its_own_config_and_settled_by_its_own_size(project, tmp_path, monkeypatch):
    architecture, where = (
        read_architecture(Layout(project / "artifacts")),
        (World(), torch.device("cpu"), torch.float32),
    )
    large = short(teacher=str(tiny.write_model(tmp_path / "large", layers=40)))
    assert described_teacher(architecture, short()) is architecture
    found, whole = described_teacher(architecture, large), describe(load_model(tmp_path / "large", torch.float32))
    assert found.to_json() == whole.to_json()
    own, other = (pass_bytes(one, CPU.batch_tokens, torch.float32).weights for one in (architecture, whole))
    assert other > 4 * own
    monkeypatch.setattr(offload, "free_memory", lambda: 2 * other)
    for params, beside, chosen in ((short(), 0, "none"), (large, 0, "disk"), (short(), 2 * other - 2 * own, "disk")):
        assert settle_teacher(architecture, params, CPU, *where, beside).offload == chosen


def test_the_identity_is_of_the_files(project, tmp_path):
    layout, other = Layout(project / "artifacts"), project / "other"
    architecture = read_architecture(layout)
    assert teacher_identity(layout, architecture, short()) == architecture.fingerprint
    first = teacher_identity(layout, architecture, short(teacher=str(other)))
    for path in other.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert teacher_identity(layout, architecture, short(teacher=str(tmp_path))) == first
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + " ")
    assert teacher_identity(layout, architecture, short(teacher=str(tmp_path))) != first
    assert teacher_identity(layout, architecture, short(teacher="some/model")) == "some/model"


def test_what_cannot_be_a_teacher_is_refused_with_the_key(project, tmp_path):
    layout = Layout(project / "artifacts")
    with pytest.raises(SourceError, match="no_such_folder/model does not exist"):
        load(layout, teacher="./no_such_folder/model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"recover\.teacher = .* cannot be loaded"):
        load(layout, teacher=str(tmp_path))


def test_another_vocabulary_is_refused(project, tmp_path):
    from transformers import AutoTokenizer

    other = tiny.write_model(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ParamsError, match=r"another vocabulary .20 tokens. than .* .19 tokens."):
        load(Layout(project / "artifacts"), teacher=str(other))


@pytest.mark.parametrize("top_k", [None, 4, 25])
def test_rows_that_only_the_teacher_has_stand_for_no_token(project, tmp_path, quick_proof, top_k):
    """Larger models of a family often have more rows of embeddings for the same tokens."""
    layout, params = Layout(project / "artifacts"), load_params(project / "params.yaml")
    padded = load_model(project / "other", torch.float32)
    padded.resize_token_embeddings(32, mean_resizing=False)
    with torch.no_grad():
        padded.get_input_embeddings().weight[19:] = 9.0
    padded.save_pretrained(tmp_path / "padded")
    tiny.write_tokenizer(tmp_path / "padded")
    losses = []
    for teacher in (project / "other", tmp_path / "padded"):
        asked = short(length=16, top_k=top_k, teacher=str(teacher))
        teach_layout(layout, CPU, asked, params.tokenize)
        recovery = recover_layout(layout, CPU, asked)
        assert recovery is not None
        losses.append((recovery.before, recovery.after))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_teacher_without_a_row_for_every_token_is_refused(project, tmp_path):
    short_one = load_model(project / "other", torch.float32)
    short_one.resize_token_embeddings(10)
    short_one.save_pretrained(tmp_path / "short")
    tiny.write_tokenizer(tmp_path / "short")
    with pytest.raises(ParamsError, match=r"has 10 rows of embeddings for 19 tokens"):
        load(Layout(project / "artifacts"), teacher=str(tmp_path / "short"))


def test_predictions_of_one_teacher_do_not_serve_for_another(project, quick_proof):
    layout, params = Layout(project / "artifacts"), load_params(project / "params.yaml")
    asked = short(length=16, top_k=4, teacher=str(project / "other"))
    teach_layout(layout, CPU, asked, params.tokenize)
    recovery = recover_layout(layout, CPU, asked)
    assert recovery is not None
    assert recovery.before > 0.05  # far from what this model predicts, near to what its own dense model does
    with pytest.raises(ArtifactError, match="belongs to teacher"):
        recover_layout(layout, CPU, asked.model_copy(update={"teacher": None}))
