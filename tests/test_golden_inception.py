"""Inception against an independent implementation (golden/README.md), and its weights from every kind of file."""
import numpy as np
import pytest
import torch
from conftest import inception_state, load_golden

from adm_repro.inception import Inception, graph_names, load_inception

KEYS = load_golden("inception.json")
G = load_golden("inception.npz")
TOLERANCE = 2e-5  # of the standard deviation


@pytest.fixture(scope="module")
def net(inception_weights):
    return load_inception(inception_weights)


def test_keys_and_shapes_are_those_of_the_published_conversion():
    assert {key: list(value.shape) for key, value in Inception().state_dict().items()} == KEYS


@pytest.mark.parametrize("size", [32, 64, 256, 299])
def test_features_and_logits(net, size):
    with torch.no_grad():
        seen = net(torch.from_numpy(G[f"{size}/images_nhwc"]))
    logits = seen.pool @ net.fc.weight.T
    for name, ours in (("pool", seen.pool), ("spatial", seen.spatial), ("logits_unbiased", logits)):
        expected = G[f"{size}/{name}"]
        assert np.abs(ours.numpy() - expected).max() <= TOLERANCE * expected.std(), name
    expected = torch.from_numpy(G[f"{size}/logits_unbiased"]).double().softmax(1)
    torch.testing.assert_close(net.probabilities(seen.pool).double(), expected, rtol=1e-3, atol=1e-6)


def test_a_batch_norm_that_is_not_folded_gives_the_same(net):
    plain = Inception()
    plain.load_state_dict(inception_state())
    images = torch.from_numpy(G["64/images_nhwc"])
    with torch.no_grad():
        for ours, other in zip(net(images), plain.eval()(images), strict=True):
            assert (ours - other).abs().max() <= TOLERANCE * other.std()


def test_the_part_up_to_mixed_6e_has_the_same_spatial_features(tmp_path):
    state = {k: v.numpy() for k, v in inception_state().items() if not k.startswith(("Mixed_7", "fc")) and "tracked" not in k}
    np.savez(tmp_path / "part.npz", **state)
    part = load_inception(tmp_path / "part.npz")
    with torch.no_grad():
        seen = part(torch.from_numpy(G["64/images_nhwc"]))
    assert not part.complete and seen.pool.shape == (2, 768)
    assert np.abs(seen.spatial.numpy() - G["64/spatial"]).max() <= TOLERANCE * G["64/spatial"].std()


def write_graph(path, state):
    """A TensorFlow graph file with these weights, as the original stores them."""
    graph_pb2 = pytest.importorskip("tensorboard.compat.proto.graph_pb2")
    from tensorboard.util.tensor_util import make_tensor_proto

    graph = graph_pb2.GraphDef()

    def constant(name, value):
        node = graph.node.add(name=name, op="Const")
        node.attr["value"].tensor.CopyFrom(make_tensor_proto(np.ascontiguousarray(value.numpy())))

    for tf, name in graph_names().items():
        constant(f"{tf}/conv2d_params", state[f"{name}.conv.weight"].permute(2, 3, 1, 0))
        for theirs, ours in (("gamma", "weight"), ("beta", "bias"), ("moving_mean", "running_mean"), ("moving_variance", "running_var")):
            constant(f"{tf}/batchnorm/{theirs}", state[f"{name}.bn.{ours}"])
    constant("softmax/weights", state["fc.weight"].T)
    constant("softmax/biases", state["fc.bias"])
    graph.node.add(name="softmax/logits/MatMul", op="MatMul")
    path.write_bytes(graph.SerializeToString())
    return graph


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tensorflow_graph_gives_the_same_weights(tmp_path, net):
    graph = write_graph(tmp_path / "classify_image_graph_def.pb", inception_state())
    from_graph = load_inception(tmp_path / "classify_image_graph_def.pb")
    assert from_graph.weights_sha256 == net.weights_sha256
    images = torch.from_numpy(G["32/images_nhwc"])
    with torch.no_grad():
        assert torch.equal(from_graph(images).pool, net(images).pool)
    del graph.node[3]
    (tmp_path / "other.pb").write_bytes(graph.SerializeToString())
    with pytest.raises(ValueError, match=r"has no constant .*it is not the graph of 2015-12-05"):
        load_inception(tmp_path / "other.pb")
    (tmp_path / "other.pb").write_bytes(b"\xff" * 99)
    with pytest.raises(ValueError, match="not a TensorFlow graph file"):
        load_inception(tmp_path / "other.pb")
