"""Pseudo-token files: exports load elsewhere, older forms load here, and no file runs code."""

import collections
import io
import json
import os
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from idea_jax.formats import learned_embeds
from idea_jax.runtime import pickles

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(2, 16)).astype(np.float32)


def torch_file(path, value, legacy=False):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


# --- writing --------------------------------------------------------------------------------------


def test_write_then_read_is_exact(tmp_path):
    path = tmp_path / "out" / learned_embeds.FILE_NAME
    learned_embeds.write(path, "<00011>", VECTORS, {"base_model": "x/y", "steps": "320"})
    found = learned_embeds.read(path)
    assert list(found) == ["<00011>"] and found["<00011>"].dtype == np.float32
    np.testing.assert_array_equal(found["<00011>"], VECTORS)


def test_write_holds_one_key_and_metadata(tmp_path):
    from safetensors import safe_open

    learned_embeds.write(tmp_path / "a.safetensors", "<me>", VECTORS, {"steps": "320"})
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert list(file.keys()) == ["<me>"]
        assert file.metadata() == {"steps": "320", "format": "pt"}


@pytest.mark.parametrize("token", ["<Me>", "two words", ""])
def test_write_refuses_tokens_that_the_tokenizer_would_not_find(tmp_path, token):
    with pytest.raises(learned_embeds.EmbedsError, match="lower case"):
        learned_embeds.write(tmp_path / "a.safetensors", token, VECTORS, {})


def test_write_refuses_what_is_not_finite_and_keeps_the_earlier_file(tmp_path):
    path = tmp_path / "a.safetensors"
    learned_embeds.write(path, "<me>", VECTORS, {})
    before = path.read_bytes()
    for bad in (np.full((2, 16), np.nan), np.full((2, 16), np.inf), np.zeros(16), np.zeros((0, 4))):
        with pytest.raises(learned_embeds.EmbedsError, match="finite|expected"):
            learned_embeds.write(path, "<me>", bad, {})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def tiny_pipeline(folder):
    """A CLIP tokenizer that knows letters only and a random encoder, as diffusers holds them."""
    from diffusers.loaders import TextualInversionLoaderMixin
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    class Pipeline(TextualInversionLoaderMixin):
        hf_device_map = None
        components: dict = {}

    letters = [chr(code) for code in range(97, 123)] + list("<>_0123456789,")
    words = letters + [letter + "</w>" for letter in letters]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    pipeline = Pipeline()
    pipeline.tokenizer = CLIPTokenizer.from_pretrained(folder)
    pipeline.text_encoder = CLIPTextModel(config).eval()
    return pipeline


def test_both_vectors_reach_the_encoder_in_diffusers(tmp_path):
    learned_embeds.write(tmp_path / learned_embeds.FILE_NAME, "<00011>", VECTORS, {"steps": "1"})
    pipeline = tiny_pipeline(tmp_path)
    pipeline.load_textual_inversion(str(tmp_path))
    prompt = pipeline.maybe_convert_prompt("a photo of <00011>", pipeline.tokenizer)
    ids = pipeline.tokenizer(prompt, return_tensors="pt").input_ids
    table = pipeline.text_encoder.get_input_embeddings().weight.detach()
    at = [(table[ids[0]] == torch.tensor(row)).all(-1).nonzero().item() for row in VECTORS]
    assert at[1] == at[0] + 1
    # The encoder's output depends on each of them.
    with torch.no_grad():
        before = pipeline.text_encoder(ids).last_hidden_state[0, -1]
        for row in range(2):
            token_id = ids[0, at[row]]
            saved = table[token_id].clone()
            pipeline.text_encoder.get_input_embeddings().weight[token_id] = 0.0
            after = pipeline.text_encoder(ids).last_hidden_state[0, -1]
            assert (after - before).abs().max() > 1e-4
            pipeline.text_encoder.get_input_embeddings().weight[token_id] = saved


def test_webui_export_follows_the_rules_of_both_readers(tmp_path):
    """AUTOMATIC1111 wants one tensor of two axes; ComfyUI takes the first; the file is the name."""
    learned_embeds.write_webui(tmp_path / "anna.safetensors", VECTORS, {"steps": "1"})
    tensors = load_file(tmp_path / "anna.safetensors")
    assert list(tensors) == ["emb_params"]
    np.testing.assert_array_equal(next(iter(tensors.values())), VECTORS)
    np.testing.assert_array_equal(
        learned_embeds.read(tmp_path / "anna.safetensors")["anna"], VECTORS
    )


# --- older forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["<00011>", "28017"])
def test_legacy_two_key_pickle_is_joined_in_order(tmp_path, legacy, name):
    rows = torch.tensor(VECTORS)
    value = {f"{name}_v1": rows[1].clone(), f"{name}_v0": rows[0].clone()}
    found = learned_embeds.read(torch_file(tmp_path / "learned_embeds.bin", value, legacy))
    assert list(found) == [name]
    np.testing.assert_array_equal(found[name], VECTORS)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensor_kinds_of_real_torch_files(tmp_path, legacy):
    base = torch.randn(6, 8)
    value = collections.OrderedDict(
        half=base.half(),
        bfloat=base.bfloat16(),
        double=base.double(),
        parameter=torch.nn.Parameter(base.clone()),
        transposed=base.T,
        part=base[1:5:2, 3:],
        row=base[4],
        stretched=base[:1].expand(3, 8),
    )
    found = learned_embeds.read(torch_file(tmp_path / "a.bin", value, legacy))
    assert list(found) == list(value)
    for key, tensor in value.items():
        expected = np.atleast_2d(tensor.detach().float().numpy())
        np.testing.assert_array_equal(found[key], expected, err_msg=key)


@pytest.mark.parametrize("legacy", [False, True])
def test_webui_pickle_is_read(tmp_path, legacy):
    value = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.tensor(VECTORS)},
        "name": "anna",
        "step": 320,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    np.testing.assert_array_equal(
        learned_embeds.read(torch_file(tmp_path / "file.pt", value, legacy))["anna"], VECTORS
    )


def test_bare_tensor_and_other_safetensors_forms(tmp_path):
    torch_file(tmp_path / "anna.pt", torch.tensor(VECTORS))
    np.testing.assert_array_equal(learned_embeds.read(tmp_path / "anna.pt")["anna"], VECTORS)
    save_file({"<x>": VECTORS[0]}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(
        learned_embeds.read(tmp_path / "a.safetensors")["<x>"], VECTORS[:1]
    )
    save_file({"clip_l": VECTORS}, tmp_path / "bob.safetensors")
    assert list(learned_embeds.read(tmp_path / "bob.safetensors")) == ["bob"]
    from safetensors.torch import save_file as torch_save_file

    rows = torch.tensor(VECTORS).bfloat16()
    torch_save_file({"x": rows}, tmp_path / "b.safetensors")
    np.testing.assert_array_equal(
        learned_embeds.read(tmp_path / "b.safetensors")["x"], rows.float().numpy()
    )


def test_names_that_only_look_numbered(tmp_path):
    save_file({"hands_v2": VECTORS[0]}, tmp_path / "a.safetensors")
    assert list(learned_embeds.read(tmp_path / "a.safetensors")) == ["hands_v2"]
    many = {name: VECTORS for name in "gfedcba"}
    save_file(many, tmp_path / "b.safetensors")
    assert list(learned_embeds.read(tmp_path / "b.safetensors")) == sorted(many)
    save_file({"x_v0": VECTORS[0], "x_v2": VECTORS[1]}, tmp_path / "c.safetensors")
    with pytest.raises(learned_embeds.EmbedsError, match=r"without gaps, got \[0, 2\]"):
        learned_embeds.read(tmp_path / "c.safetensors")
    save_file({"x_v0": VECTORS[0], "x_v1": VECTORS[1, :4]}, tmp_path / "d.safetensors")
    with pytest.raises(learned_embeds.EmbedsError, match="do not belong together"):
        learned_embeds.read(tmp_path / "d.safetensors")


def test_locate_prefers_what_exists_and_says_what_it_took(tmp_path):
    asked = tmp_path / "learned_embeds.bin"
    with pytest.raises(learned_embeds.EmbedsError, match=r"learned_embeds\.bin does not exist"):
        learned_embeds.locate(asked)
    with pytest.raises(learned_embeds.EmbedsError, match="no learned_embeds"):
        learned_embeds.locate(tmp_path)
    safe = tmp_path / learned_embeds.FILE_NAME
    safe.write_bytes(b"x")
    path, notice = learned_embeds.locate(asked)
    assert path == safe and "reading learned_embeds.safetensors" in notice
    asked.write_bytes(b"x")
    assert learned_embeds.locate(asked) == (asked, None)
    assert learned_embeds.locate(tmp_path) == (safe, None)
    with pytest.raises(learned_embeds.EmbedsError, match="does not exist"):
        learned_embeds.locate(tmp_path / "other.bin")


# --- hostile files --------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function` with `arguments`, and optionally a state set afterwards."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def gadgets(marker):
    """Ways to make an unpickler create the file `marker`."""
    command = f"open({str(marker)!r}, 'w').close()"
    touch = f"touch {marker}"
    return {
        "os.system": Call(os.system, touch),
        "eval": Call(eval, command),
        "exec": Call(exec, command),
        "getattr": Call(getattr, Call(__import__, "builtins"), "exec"),
        "torch.load": Call(torch.load, str(marker)),
        "numpy": Call(np.fromfile, str(marker)),
        "setstate": Call(collections.OrderedDict, state={"__setstate__": Call(os.system, touch)}),
        "open": Call(open, str(marker), "w"),
        "ordered dict of a call": collections.OrderedDict(a=Call(os.system, touch)),
    }


# getattr(__import__("os"), "system")("touch marker"): a call of what another call returned.
NESTED_GETATTR = (
    b"\x80\x02cbuiltins\ngetattr\n(cbuiltins\n__import__\nX\x02\x00\x00\x00os\x85R"
    b"X\x06\x00\x00\x00systemtRX\x0c\x00\x00\x00touch marker\x85R."
)
# The same through the instruction INST, which needs no REDUCE.
INST = b"(S'touch marker'\nios\nsystem\n."


def as_zip(pickled, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return path


def as_legacy(pickled, path, keys=b"\x80\x02]."):
    head = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)]
    head += [pickle.dumps({"little_endian": True}, 2), pickled, keys]
    path.write_bytes(b"".join(head))
    return path


@pytest.mark.parametrize("wrap", [as_zip, as_legacy, None])
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", gadgets("x"))
def test_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path, name, protocol, wrap):
    marker = tmp_path / "marker"
    pickled = pickle.dumps({"<x>_v0": gadgets(marker)[name]}, protocol)
    path = tmp_path / "learned_embeds.bin"
    path.write_bytes(pickled) if wrap is None else wrap(pickled, path)
    with pytest.raises(learned_embeds.EmbedsError, match=r"learned_embeds\.bin: "):
        learned_embeds.read(path)
    assert not marker.exists()


@pytest.mark.parametrize("body", [NESTED_GETATTR, INST, "os.system", "eval", "exec", "open"])
def test_gadgets_run_under_pythons_own_loader(tmp_path, monkeypatch, body):
    """So the refusals above and below mean something."""
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "marker"
    pickle.loads(body if isinstance(body, bytes) else pickle.dumps(gadgets(marker)[body], 2))
    assert marker.exists()


@pytest.mark.parametrize(
    "body",
    [
        NESTED_GETATTR,
        # Instructions that call or build without REDUCE: INST, OBJ, BUILD, NEWOBJ, and others.
        INST,
        b"\x80\x02" + INST,
        b"\x80\x02(cos\nsystem\nX\x01\x00\x00\x00ao.",
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00a}sb.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x02\x82\x01.",
        # References to nothing, and cut-off files.
        b"\x80\x02h\x05.",
        b"\x80\x02R.",
        b"\x80\x02u.",
        b"\x80\x02}q\x00(X\x04\x00\x00\x00ab",
        b"\x80\x02K\x01Q.",
        b"\x80\x02.",
        b"\x80\x02]\x94.",
    ],
)
def test_crafted_instructions_are_refused(tmp_path, monkeypatch, body):
    monkeypatch.chdir(tmp_path)
    for wrap in (as_zip, as_legacy):
        with pytest.raises(learned_embeds.EmbedsError):
            learned_embeds.read(wrap(body, tmp_path / "a.bin"))
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    "body",
    [
        b"\x80\x02X\x02\x00\x00\x00os)R.",  # a text
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # a type of storage
        b"\x80\x02)(K\x01tR.",  # a tuple
        b"\x80\x02ccollections\nOrderedDict\n]R.",  # a function, with a list as arguments
    ],
)
def test_only_functions_are_called(tmp_path, body):
    with pytest.raises(learned_embeds.EmbedsError, match="no function"):
        learned_embeds.read(as_zip(body, tmp_path / "a.bin"))


def test_other_pickle_protocols_are_named(tmp_path):
    torch.save({"x": torch.zeros(4)}, tmp_path / "a.bin", pickle_protocol=4)
    with pytest.raises(learned_embeds.EmbedsError, match="expected pickle protocol 2.*got 4"):
        learned_embeds.read(tmp_path / "a.bin")


def test_legacy_storage_of_another_length_is_refused(tmp_path):
    path = torch_file(tmp_path / "a.bin", {"x": torch.zeros(4)}, legacy=True)
    whole = bytearray(path.read_bytes())
    assert whole[-24:-16] == struct.pack("<q", 4)
    for numel in (3, 5, -1, 2**62):
        whole[-24:-16] = struct.pack("<q", numel)
        path.write_bytes(whole)
        with pytest.raises(learned_embeds.EmbedsError, match=f"has {numel} values, 4 announced"):
            learned_embeds.read(path)


def test_big_endian_files_are_refused(tmp_path):
    whole = torch_file(tmp_path / "a.bin", {"x": torch.zeros(4)}, legacy=True).read_bytes()
    flag = b"little_endianq\x02\x88"
    assert flag in whole
    (tmp_path / "a.bin").write_bytes(whole.replace(flag, flag[:-1] + b"\x89"))
    with pytest.raises(learned_embeds.EmbedsError, match="big-endian"):
        learned_embeds.read(tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/byteorder", "big")
    with pytest.raises(learned_embeds.EmbedsError, match="big-endian"):
        learned_embeds.read(tmp_path / "a.bin")


def test_overlapping_archive_entries_are_refused(tmp_path):
    """Many entries of the directory that claim the same megabyte."""
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", bytes(1_000_000))
        entry = archive.getinfo("a/data.pkl")
        for number in range(20):
            again = zipfile.ZipInfo(f"a/data/{number}")
            again.CRC, again.header_offset = entry.CRC, entry.header_offset
            again.file_size = again.compress_size = entry.file_size
            archive.filelist.append(again)
    assert path.stat().st_size < 1_100_000
    with pytest.raises(learned_embeds.EmbedsError, match="overlap or are too large"):
        learned_embeds.read(path)


def test_pickle_that_torch_has_not_written_is_named(tmp_path):
    (tmp_path / "a.bin").write_bytes(pickle.dumps({"x": 1}, 2))
    with pytest.raises(learned_embeds.EmbedsError, match=r"torch\.save has not written"):
        learned_embeds.read(tmp_path / "a.bin")


def test_calls_reach_only_the_functions_of_the_loader():
    called = {value.__name__ for value in pickles._GLOBALS.values() if callable(value)}
    functions = {"_rebuild_tensor", "_rebuild_parameter", "_ordered_dict", "_no_set"}
    assert called == functions | {"_Parameters"}


@pytest.mark.parametrize("legacy", [False, True])
def test_the_first_textual_inversion_kept_a_module_of_parameters(tmp_path, legacy):
    """The id of the token was a tensor, and the vectors were those of a torch module."""
    vectors = torch.nn.ParameterDict()
    vectors["*"] = torch.nn.Parameter(torch.tensor(VECTORS))
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": vectors}
    path = tmp_path / "anna.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = learned_embeds.read(path)
    assert found.keys() == {"anna"}
    np.testing.assert_array_equal(found["anna"], VECTORS)


def nested_tuples(levels):
    value = b")"
    for _ in range(levels):
        value += b"q\x00h\x00\x86"  # the tuple so far, twice
    return value


@pytest.mark.parametrize("place", ["key", "shape", "storage", "value", "storage list"])
def test_bombs_of_nested_tuples_take_no_time(tmp_path, place):
    """2**60 leaves from a few bytes, where something might hash, print or walk them."""
    bomb = nested_tuples(60)
    pid = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    pid += b"K\x04tQ"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    body = {
        "key": b"\x80\x02}" + bomb + b"K\x01s.",
        "shape": b"\x80\x02}X\x01\x00\x00\x00a"
        + rebuild
        + b"("
        + pid
        + b"K\x00"
        + bomb
        + b"K\x01\x85\x89ccollections\nOrderedDict\n)RtRs.",
        "storage": b"\x80\x02" + bomb + b"Q.",
        "storage list": b"\x80\x02}.",
        "value": b"\x80\x02}X\x01\x00\x00\x00a" + bomb + b"s.",
    }[place]
    keys = b"\x80\x02]" + bomb + b"a." + bytes(8)
    start = time.perf_counter()
    for path in (as_zip(body, tmp_path / "a.bin"), as_legacy(body, tmp_path / "b.bin", keys)):
        with pytest.raises(learned_embeds.EmbedsError) as caught:
            learned_embeds.read(path)
        assert len(str(caught.value)) < 1000
    assert time.perf_counter() - start < 5


def test_tensor_outside_its_storage_is_refused(tmp_path):
    whole = torch_file(tmp_path / "a.bin", {"x": torch.arange(4.0)}).read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = entries["a/data.pkl"]
    size_and_stride = b"K\x00K\x04\x85q\x08K\x01\x85q\x09"
    assert size_and_stride in pickled
    for forged, message in (
        (b"K\x01K\x04\x85q\x08K\x01\x85q\x09", "reaches to value 4"),  # offset 1
        (b"K\x00K\x05\x85q\x08K\x01\x85q\x09", "reaches to value 4"),  # five values
        (b"K\x00K\x04\x85q\x08K\x02\x85q\x09", "reaches to value 6"),  # stride 2
        (b"J\xff\xff\xff\xffK\x04\x85q\x08K\x01\x85q\x09", "no counts"),  # offset -1
        (b"K\x00K\x04\x85q\x08J\xff\xff\xff\xff\x85q\x09", "no counts"),  # stride -1
        (b"K\x00X\x01\x00\x00\x004\x85q\x08K\x01\x85q\x09", "no counts"),  # a text as size
        (b"K\x00K\x04K\x04\x86q\x08K\x00\x85q\x09", "damaged"),  # two sizes, one stride
        (b"K\x00J\xff\xff\xff\x7f\x85q\x08K\x00\x85q\x09", "of shape"),  # 2**31 times one
    ):
        with zipfile.ZipFile(tmp_path / "forged.bin", "w") as archive:
            for name, data in entries.items():
                data = pickled.replace(size_and_stride, forged) if name == "a/data.pkl" else data
                archive.writestr(name, data)
        with pytest.raises(learned_embeds.EmbedsError, match=message):
            learned_embeds.read(tmp_path / "forged.bin")
    np.testing.assert_array_equal(
        learned_embeds.read(tmp_path / "a.bin")["x"], [[0.0, 1.0, 2.0, 3.0]]
    )


def test_size_limits(tmp_path):
    big = tmp_path / "model.safetensors"
    big.write_bytes(bytes(learned_embeds.MAX_BYTES + 1))
    with pytest.raises(learned_embeds.EmbedsError, match="too large for pseudo tokens"):
        learned_embeds.read(big)
    many = {f"k{i}": torch.zeros(2) for i in range(learned_embeds.MAX_KEYS + 1)}
    with pytest.raises(learned_embeds.EmbedsError, match="more than 100"):
        learned_embeds.read(torch_file(tmp_path / "many.bin", many))
    save_file({key: np.zeros(2, np.float32) for key in many}, tmp_path / "many.safetensors")
    with pytest.raises(learned_embeds.EmbedsError, match="more than 100 keys"):
        learned_embeds.read(tmp_path / "many.safetensors")
    save_file({"k" * 300: np.zeros(2, np.float32)}, tmp_path / "name.safetensors")
    with pytest.raises(learned_embeds.EmbedsError, match="more than 200 characters"):
        learned_embeds.read(tmp_path / "name.safetensors")
    with pytest.raises(learned_embeds.EmbedsError, match="it asks for os.k") as caught:
        learned_embeds.read(
            as_zip(b"\x80\x02cos\n" + b"k" * 10_000 + b"\n.", tmp_path / "name.bin")
        )
    assert len(str(caught.value)) < 1000
    shared = {str(i): torch.zeros(2) for i in range(20)}
    with pytest.raises(learned_embeds.EmbedsError, match="more than 100"):
        learned_embeds.read(
            torch_file(tmp_path / "shared.bin", {str(i): shared for i in range(20)})
        )
    for shape in ((76, 4), (2, 8193), (2, 2, 2), ()):
        with pytest.raises(learned_embeds.EmbedsError, match="expected .* of shape"):
            learned_embeds.read(torch_file(tmp_path / "shape.bin", {"x": torch.zeros(shape)}))
    with pytest.raises(learned_embeds.EmbedsError, match="too long"):
        learned_embeds.read(as_zip(b"\x80\x02" + b"N" * 30_000 + b".", tmp_path / "long.bin"))


def test_compressed_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100_000_000))
    assert (tmp_path / "bomb.bin").stat().st_size < 200_000
    with pytest.raises(learned_embeds.EmbedsError, match="compression"):
        learned_embeds.read(tmp_path / "bomb.bin")


@pytest.mark.parametrize("legacy", [False, True])
def test_cut_and_flipped_files_never_give_wrong_tensors(tmp_path, legacy):
    value = {"x_v0": torch.tensor(VECTORS[0]), "x_v1": torch.tensor(VECTORS[1])}
    whole = torch_file(tmp_path / "a.bin", value, legacy).read_bytes()
    for length in range(0, len(whole) - 1, 13):
        (tmp_path / "cut.bin").write_bytes(whole[:length])
        with pytest.raises(learned_embeds.EmbedsError, match="cut.bin"):
            learned_embeds.read(tmp_path / "cut.bin")
    learned_embeds.write(tmp_path / "a.safetensors", "x", VECTORS, {})
    whole = (tmp_path / "a.safetensors").read_bytes()
    for length in range(0, len(whole) - 1, 13):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(learned_embeds.EmbedsError, match=r"cut\.safetensors"):
            learned_embeds.read(tmp_path / "cut.safetensors")


def test_random_damage_gives_one_kind_of_error(tmp_path):
    value = {"x_v0": torch.tensor(VECTORS[0]), "x_v1": torch.tensor(VECTORS[1])}
    rng = np.random.default_rng(3)
    for legacy in (False, True):
        whole = torch_file(tmp_path / "a.bin", value, legacy).read_bytes()
        refused = 0
        for _ in range(150):
            damaged = bytearray(whole)
            damaged[rng.integers(len(whole))] = rng.integers(256)
            (tmp_path / "a.bin").write_bytes(damaged)
            try:
                learned_embeds.read(tmp_path / "a.bin")
            except learned_embeds.EmbedsError as error:  # any other kind fails the test
                assert str(tmp_path / "a.bin") in str(error)
                refused += 1
        assert refused > 50


def test_unusable_content_is_named(tmp_path):
    (tmp_path / "a.bin").write_text("hello")
    with pytest.raises(learned_embeds.EmbedsError, match="neither a safetensors file nor"):
        learned_embeds.read(tmp_path / "a.bin")
    with pytest.raises(learned_embeds.EmbedsError, match=r"absent\.bin cannot be read"):
        learned_embeds.read(tmp_path / "absent.bin")
    save_file({"clip_g": VECTORS}, tmp_path / "half.safetensors")
    with pytest.raises(
        learned_embeds.EmbedsError, match="SDXL.* clip_l and clip_g, found 'clip_g'"
    ):
        learned_embeds.read(tmp_path / "half.safetensors")
    save_file({"clip_l": VECTORS, "clip_g": VECTORS[:1]}, tmp_path / "odd.safetensors")
    with pytest.raises(learned_embeds.EmbedsError, match="expected as many"):
        learned_embeds.read(tmp_path / "odd.safetensors")
    save_file({"x": np.zeros((2, 4), np.int64)}, tmp_path / "int.safetensors")
    with pytest.raises(learned_embeds.EmbedsError, match="floating-point"):
        learned_embeds.read(tmp_path / "int.safetensors")
    save_file({"x": np.full((2, 4), np.nan, np.float32)}, tmp_path / "nan.safetensors")
    with pytest.raises(learned_embeds.EmbedsError, match="not finite"):
        learned_embeds.read(tmp_path / "nan.safetensors")
    with pytest.raises(learned_embeds.EmbedsError, match="expected a tensor under 'x', got int"):
        learned_embeds.read(torch_file(tmp_path / "a.bin", {"x": 3}))
    header = json.dumps({"x": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 99]}}).encode()
    (tmp_path / "lie.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(32))
    with pytest.raises(learned_embeds.EmbedsError, match="damaged"):
        learned_embeds.read(tmp_path / "lie.safetensors")


def test_reading_imports_no_torch(tmp_path):
    import subprocess
    import sys

    path = torch_file(tmp_path / "learned_embeds.bin", {"x_v0": torch.zeros(4)})
    code = (
        "import sys; from idea_jax.formats import learned_embeds as le; "
        f"assert 'x' in le.read({str(path)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
