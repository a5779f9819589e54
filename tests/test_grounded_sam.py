"""Grounded-SAM: tiny models of the true classes through the true code; captions, boxes and nouns; weights and downloads."""
import functools
import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from transformers import BertConfig, BertTokenizerFast

import config as configuration
import masks
from masks import GroundedSAM, boxes_of_nouns, build_dino, caption_of

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".?!-,'", "dog", "cat", "tree", "fire", "truck", "hydrant", "snow",
         "skate", "##board", "##s", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
SIDE = 64  # of SAM's input here; 1024 in the published models


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("bert"))


def tiny_tokenizer(folder):
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return BertTokenizerFast.from_pretrained(folder)


def fill(module, seed):
    """Random weights that depend only on the names and shapes of the parameters, so that they are the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            small = noise / math.sqrt(p[0].numel()) if p.dim() > 1 else 0.1 * noise
            p.copy_(small if p.dim() > 1 or name.endswith("bias") else 1 + small)
    return module


def tiny_dino(tokenizer):
    """GroundingDINO's own class with narrow layers: 20 queries, 2 + 2 layers."""
    from groundingdino.models.GroundingDINO.backbone import backbone
    bert = BertConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    narrow = functools.partial(backbone.build_swin_transformer, embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "build_swin_transformer", narrow)
        return fill(build_dino(tokenizer, bert, num_queries=20, enc_layers=2, dec_layers=2, dim_feedforward=64), 0)


def tiny_sam(width=32):
    """SAM's own classes, small; a width of 768 is the published vit_b's."""
    encoder = ImageEncoderViT(img_size=SIDE, patch_size=16, embed_dim=width, depth=2, num_heads=4, out_chans=32,
                              mlp_ratio=0.5, use_rel_pos=True, window_size=2, global_attn_indexes=(1,))
    prompts = PromptEncoder(embed_dim=32, image_embedding_size=(SIDE // 16,) * 2, input_image_size=(SIDE,) * 2, mask_in_chans=4)
    decoder = MaskDecoder(transformer_dim=32, transformer=TwoWayTransformer(2, 32, 4, 64))
    return fill(Sam(encoder, prompts, decoder), 1).eval()


@pytest.fixture(scope="module")
def models(tokenizer):
    return tiny_dino(tokenizer), tiny_sam()


@pytest.fixture
def segmenter(models, monkeypatch):
    """Lets nearly every box through: with random weights no score means anything."""
    monkeypatch.setattr(masks, "DINO_SIDE", 96)
    return GroundedSAM(*models, box_threshold=0.05, text_threshold=0.05)


def pictures(count, height=40, width=40, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def reference_outputs(tokenizer):
    """Logits of a caption's tokens and boxes of the first three queries of the tiny GroundingDINO."""
    image = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = tiny_dino(tokenizer)(image, captions=["fire hydrants . dog ."])
    return out["pred_logits"][0, :3, :8], out["pred_boxes"][0, :3]


def refuses(parts, call, *arguments):
    """The call raises ValueError, one line with all these parts in it."""
    with pytest.raises(ValueError) as error:
        call(*arguments)
    line = str(error.value)
    assert "\n" not in line and all(str(part) in line for part in parts), line


# ---------------------------------------------------------------------------------------------------------------------
# The models

# reference_outputs with masks.TextEncoder = groundingdino.models.GroundingDINO.bertwarper.BertModelWarper, that is the
# unfixed package, on transformers 4.57.6 (torch 2.14.1, CPU, float32)
LOGITS = [[-23.0306358, -8.1298504, -11.2552509, -5.7116075, -14.1246519, -5.7175989, -12.0405293, -16.1161079],
          [-22.7002220, -7.9224710, -10.0749989, -6.7847261, -11.6328869, -7.3669205, -14.2942505, -15.6283054],
          [-23.7836704, -6.7819896, -11.1651812, -5.1229124, -11.4725628, -5.1747875, -13.0727482, -14.2980042]]
BOXES = [[0.2791375, 0.9834030, 0.3492020, 0.0816029], [0.5927217, 0.2313705, 0.2842555, 0.0893345],
         [0.1347613, 0.3274394, 0.4582396, 0.1420042]]


def test_the_fixed_groundingdino_equals_the_original_on_transformers_4(tokenizer):
    logits, boxes = reference_outputs(tokenizer)
    torch.testing.assert_close(logits, torch.tensor(LOGITS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(boxes, torch.tensor(BOXES), rtol=0, atol=1e-5)


def test_the_fix_does_not_outlive_the_building_of_a_model(models):
    import groundingdino.models.GroundingDINO.groundingdino as package
    from groundingdino.models.GroundingDINO.bertwarper import BertModelWarper
    assert package.BertModelWarper is BertModelWarper
    assert hasattr(package.get_tokenlizer, "get_pretrained_language_model")


def test_groundingdino_reads_each_caption_of_a_batch_as_if_it_were_alone(models):
    dino, images = models[0], torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(4))
    captions = ["dog .", "fire hydrants . dog . snow .", "tree . cat ."]
    with torch.no_grad():
        together = dino(images, captions=captions)
        for b, caption in enumerate(captions):
            alone, n = dino(images[b:b + 1], captions=[caption]), len(dino.tokenizer(caption)["input_ids"])
            torch.testing.assert_close(together["pred_logits"][b, :, :n], alone["pred_logits"][0, :, :n], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(together["pred_boxes"][b], alone["pred_boxes"][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 40), (64, 48), (30, 90)])
def test_a_cut_out_is_that_of_sams_own_predictor(segmenter, models, size):
    pixels = masks.to_bytes(pictures(1, *size)[0])
    boxes = torch.tensor([[2.0, 3.0, 20.0, 25.0], [10.0, 5.0, 30.0, 28.0], [0.0, 0.0, 29.0, 29.0]])
    predictor = SamPredictor(models[1])
    predictor.set_image(pixels)
    boxes_there = predictor.transform.apply_boxes_torch(boxes, size)
    expected = predictor.predict_torch(None, None, boxes_there, multimask_output=False)[0]
    found = segmenter.cut_out(pixels, boxes)
    assert found.shape == (3, *size) and torch.equal(found, expected[:, 0]) and 0 < found.float().mean() < 1


# ---------------------------------------------------------------------------------------------------------------------
# Images and nouns -> masks

NOUNS = [["dog", "fire hydrants"], [], ["tree"], ["skateboard", "snow", "cat"]]


def test_masks_of_a_batch_equal_those_of_its_images_one_by_one(segmenter):
    segmenter.box_threshold = segmenter.text_threshold = 0.0
    images = pictures(4)
    together = segmenter.masks(images, NOUNS)
    assert [m.shape for m in together] == [(2, 40, 40), (0, 40, 40), (1, 40, 40), (3, 40, 40)]
    assert all(set(m.unique().tolist()) <= {0.0, 1.0} for m in together)
    assert sum(bool(mask.any()) for m in together for mask in m) >= 4
    for b in range(4):
        alone, = segmenter.masks(images[b:b + 1], NOUNS[b:b + 1])
        assert torch.equal(alone, together[b])


def answers(dino, monkeypatch, rows):
    """Makes GroundingDINO find fixed boxes: rows of [(centre x, centre y, width, height), {token: score}] per image."""
    logits = torch.full((len(rows), 20, 256), -20.0)
    boxes = torch.full((len(rows), 20, 4), 0.5)
    for b, row in enumerate(rows):
        for q, (box, scores) in enumerate(row):
            boxes[b, q] = torch.tensor(box)
            for token, score in scores.items():
                logits[b, q, token] = torch.tensor(score).logit()
    calls = []
    monkeypatch.setattr(dino, "forward", lambda images, captions: calls.append(captions) or {
        "pred_logits": logits, "pred_boxes": boxes})
    return calls


def test_boxes_become_the_masks_of_their_nouns(segmenter, monkeypatch):
    segmenter.box_threshold, segmenter.text_threshold = 0.3, 0.25
    left, right, both = (0.25, 0.5, 0.3, 0.6), (0.75, 0.5, 0.3, 0.6), (0.5, 0.5, 0.9, 0.9)
    # [CLS] 0, dog 1, "." 2, fire 3, hydrant 4, ##s 5, "." 6, cat 7
    calls = answers(segmenter.dino, monkeypatch, [[
        (left, {1: 0.9}), (right, {1: 0.4, 3: 0.3}), (both, {4: 0.6, 1: 0.1}), (left, {7: 0.28})]])
    image = pictures(1, 30, 60)
    found, = segmenter.masks(image, [["dog", "fire hydrants", "cat"]])
    assert calls == [["dog . fire hydrants . cat ."]]
    corners = torch.tensor([[6.0, 6, 24, 24], [36, 6, 54, 24], [3, 1.5, 57, 28.5]])  # pixels of 60 x 30
    one, two, three = segmenter.cut_out(masks.to_bytes(image[0]), corners)
    assert torch.equal(found[0], (one | two).float()) and torch.equal(found[1], three.float())
    assert not torch.equal(found[0], found[1]) and found[0].any() and found[1].any()
    assert not found[2].any()  # its only box is below the box threshold


def test_one_pass_of_each_model_for_what_is_asked_and_found(segmenter, monkeypatch):
    segmenter.box_threshold, segmenter.text_threshold = 0.3, 0.25
    box, passes = (0.5, 0.5, 0.5, 0.5), []
    calls = answers(segmenter.dino, monkeypatch, [[(box, {1: 0.9}), (box, {1: 0.8})], []])
    for name in ("image_encoder", "mask_decoder"):
        getattr(segmenter.sam, name).register_forward_hook(lambda *_, name=name: passes.append(name))
    found = segmenter.masks(pictures(3), [["dog"], [], ["cat", "tree"]])
    assert calls == [["dog .", "cat . tree ."]] and passes == ["image_encoder", "mask_decoder"]
    assert found[0].any() and found[1].shape == (0, 40, 40)
    assert found[2].shape == (2, 40, 40) and not found[2].any()  # not found: empty, and kept


def test_without_nouns_nothing_runs(segmenter, monkeypatch):
    monkeypatch.setattr(segmenter.dino, "forward", None)
    for nouns in ([], [""], [" ", ""]):
        found = segmenter.masks(pictures(2), [nouns, nouns])
        assert [m.shape for m in found] == [(len(nouns), 40, 40)] * 2 and not any(m.any() for m in found)


def test_the_models_are_frozen_and_leave_no_tape(segmenter):
    segmenter.box_threshold = segmenter.text_threshold = 0.0
    found, = segmenter.masks(pictures(1).requires_grad_(), [["dog"]])
    assert not found.requires_grad and not segmenter.training
    assert not any(p.requires_grad for p in segmenter.parameters())


def test_bfloat16_is_for_the_image_encoder_only(tokenizer, models, segmenter):
    lower = GroundedSAM(models[0], tiny_sam(), dtype=torch.bfloat16)
    kinds = {name: {p.dtype for p in part.parameters()} for name, part in lower.sam.named_children()}
    assert kinds == {"image_encoder": {torch.bfloat16}, "prompt_encoder": {torch.float32}, "mask_decoder": {torch.float32}}
    assert {p.dtype for p in lower.dino.parameters()} == {torch.float32}
    pixels, boxes = masks.to_bytes(pictures(1)[0]), torch.tensor([[2.0, 3.0, 20.0, 25.0]])
    lower.cut_out(pixels, boxes), segmenter.cut_out(pixels, boxes)
    rounded, exact = lower.predictor.features, segmenter.predictor.features
    assert rounded.dtype == torch.float32 and 1e-4 < (rounded - exact).norm() / exact.norm() < 0.03


# ---------------------------------------------------------------------------------------------------------------------
# Captions, boxes and nouns

@pytest.mark.parametrize("nouns", [
    ["dog", "cats"], ["fire hydrant", "fire truck", "truck"], ["skateboard", "board", "dogs"], ["st. dog", "cat?", "tree"],
    ["Dog", "ÉTÉ", "\u0130dog"], ["dog!cat", "don't", "tree-dog"], ["  dog ", "cat\ntree"], ["犬", "🐕", "dog"],
    ["[SEP]", "dog"]])
def test_each_noun_has_the_tokens_of_its_place_in_the_caption(tokenizer, nouns):
    text, tokens = caption_of(nouns, tokenizer)
    assert text == " . ".join(nouns) + " ."
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert all(tokens)
    start = 0
    for noun, own in zip(nouns, tokens):
        assert own == list(range(own[0], own[-1] + 1))
        a, b = offsets[own[0]][0], offsets[own[-1]][1]
        assert start <= a and text[a:b] == noun.strip()
        start += len(noun) + 3
    assert len({i for own in tokens for i in own}) == sum(map(len, tokens))  # no token has two nouns


def test_odd_nouns_never_crash(segmenter):
    segmenter.box_threshold = segmenter.text_threshold = 0.0
    nouns = ["", ".", "?", "[SEP]", "[CLS] dog", "[PAD]", "\ud800", "\u200d", ". . .", "dog", "a" * 300]
    together, *alone = segmenter.masks(pictures(1 + len(nouns)), [nouns, *([noun] for noun in nouns)])
    assert together.shape == (len(nouns), 40, 40) and {m.shape for m in alone} == {(1, 40, 40)}


def test_nouns_beyond_groundingdinos_256_tokens_are_left_out_with_a_warning(segmenter):
    nouns = [a + b for a in "abcdefghijkl" for b in "mnopqrstuvwx"]  # 144 nouns of 2 tokens and a full stop
    with pytest.warns(UserWarning, match="60 of 144 nouns"):
        text, tokens = caption_of(nouns, segmenter.dino.tokenizer)
    assert len(segmenter.dino.tokenizer(text)["input_ids"]) == 254  # 84 * 3, [CLS] and [SEP]
    assert all(tokens[:84]) and not any(tokens[84:]) and text.endswith(f"{nouns[83]} .")
    segmenter.box_threshold = segmenter.text_threshold = 0.0
    with pytest.warns(UserWarning, match="left out"):
        found, = segmenter.masks(pictures(1), [nouns])
    assert len(found) == 144 and not found[84:].any()


@pytest.mark.parametrize("scores, expected", {
    "its own": ({1: 0.9}, 0), "two words, one found": ({4: 0.5}, 1), "the higher of two": ({1: 0.4, 3: 0.5}, 1),
    "box threshold": ({1: 0.29}, None), "text threshold": ({2: 0.6, 1: 0.24}, None), "by a full stop": ({2: 0.6, 1: 0.26}, 0),
    "nobody's": ({0: 0.9, 6: 0.9}, None)}.values(), ids=lambda value: str(value))
def test_a_box_belongs_to_the_noun_with_the_highest_token(scores, expected):
    row = torch.zeros(1, 256)
    for token, score in scores.items():
        row[0, token] = score
    boxes, nouns = boxes_of_nouns(row, [[1], [3, 4], []], 0.3, 0.25)
    assert (boxes.tolist(), nouns.tolist()) == (([0], [expected]) if expected is not None else ([], []))


def test_the_best_boxes_are_kept_and_no_more_than_sam_can_hold():
    scores = torch.zeros(900, 256)
    scores[:, 1] = torch.linspace(0.2, 0.9, 900)
    boxes, nouns = boxes_of_nouns(scores, [[1], [2]], 0.3, 0.25)
    assert boxes.tolist() == list(range(899, 899 - masks.MAX_BOXES, -1)) and set(nouns.tolist()) == {0}
    assert len(boxes_of_nouns(scores, [[1], [2]], 0.0, 0.0)[0]) == masks.MAX_BOXES


# ---------------------------------------------------------------------------------------------------------------------
# Weights

@pytest.fixture
def files(tmp_path, tokenizer, monkeypatch):
    """Checkpoints as they are published, of tiny models, and a Config that names them."""
    import segment_anything
    dino, sam = tiny_dino(tokenizer), tiny_sam(768)
    monkeypatch.setattr(masks, "build_dino", lambda tokenizer: fill(tiny_dino(tokenizer), 9))
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", lambda: fill(tiny_sam(768), 9))
    spare = {"label_enc.weight": torch.zeros(3, 4), "bert.embeddings.position_ids": torch.arange(512)[None]}
    torch.save({"model": {f"module.{k}": v for k, v in {**dino.state_dict(), **spare}.items()}}, tmp_path / "dino.pth")
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    tiny_tokenizer(tmp_path)
    return replace(configuration.Config(), dino=str(tmp_path / "dino.pth"), dino_tokenizer=str(tmp_path), sam_type="vit_b",
                   sam=str(tmp_path / "sam.pth"), box_threshold=0.4, text_threshold=0.2)


def test_published_files_load_into_the_models(files, tokenizer):
    loaded = masks.load_segmenter(files, "cpu")
    assert (loaded.box_threshold, loaded.text_threshold, loaded.dtype) == (0.4, 0.2, torch.float32)
    for ours, theirs in ((loaded.dino, tiny_dino(tokenizer)), (loaded.sam.mask_decoder, tiny_sam(768).mask_decoder)):
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    loaded.box_threshold = loaded.text_threshold = 0.0
    assert loaded.masks(pictures(1), [["dog"]])[0].any()


def test_files_that_cannot_be_used_are_refused_in_one_line(files, tmp_path):
    whole = Path(files.sam).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "page.pth").write_text("<html>404</html>")
    (tmp_path / "empty.pth").touch()
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "code.pth")  # would run code if it were unpickled
    torch.save([1, 2], tmp_path / "list.pth")
    changes = [
        ({"dino": files.sam}, f"--dino {files.sam}", "groundingdino_swint_ogc.pth"),
        ({"sam": files.dino}, f"--sam {files.dino}", "sam_vit_b_01ec64.pth"),
        ({"sam_type": "vit_h"}, files.sam, "vit_b, not vit_h", "--sam-type vit_b"),
        ({"dino_tokenizer": "/nowhere/bert"}, "--dino-tokenizer /nowhere/bert")]
    for flag in ("dino", "sam"):
        changes += [({flag: "/nowhere/x.pth"}, f"--{flag} /nowhere/x.pth", "no such file"),
                    ({flag: str(tmp_path / "list.pth")}, f"--{flag} {tmp_path / 'list.pth'}", "checkpoint")]
        changes += [({flag: str(tmp_path / f"{bad}.pth")}, f"--{flag} {tmp_path / bad}.pth", "not whole")
                    for bad in ("cut", "page", "empty", "code")]
    for change, *parts in changes:
        refuses(parts, masks.load_segmenter, replace(files, **change))


def test_bfloat16_is_for_gpus_only():
    config = configuration.Config(dtype="bfloat16")
    assert masks.encoder_dtype(config, "cuda:0") == torch.bfloat16
    assert masks.encoder_dtype(config, torch.device("cpu")) == torch.float32
    assert masks.encoder_dtype(replace(config, dtype="float32"), "cuda") == torch.float32


def test_another_tokenizer_than_berts_is_refused():
    refuses(["--dino-tokenizer", "bert-base-uncased"], build_dino, masks.load_tokenizer())


def test_sam_is_downloaded_once_and_only_whole(files, tmp_path, monkeypatch):
    (site := tmp_path / "site").mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(masks, "SAM_SITE", f"{site.as_uri()}/")
    cached = tmp_path / "hub" / "checkpoints" / "sam_vit_b_01ec64.pth"

    def publish(content, sha256):
        (site / cached.name).write_bytes(content)
        monkeypatch.setitem(masks.SAM_FILES, "vit_b", (cached.name, sha256, 768))

    content = Path(files.sam).read_bytes()
    refuses([site, "--sam FILE"], masks.fetch_sam, "vit_b")  # the address fails
    publish(content[:-1], hashlib.sha256(content).hexdigest())
    refuses([site, "invalid hash", "--sam FILE"], masks.fetch_sam, "vit_b")
    assert [p.suffix for p in cached.parent.iterdir()] == [".lock"]
    publish(content, hashlib.sha256(content).hexdigest())
    masks.load_segmenter(replace(files, sam=""))
    assert cached.read_bytes() == content and len(list(cached.parent.iterdir())) == 2
    (site / cached.name).unlink()
    assert masks.fetch_sam("vit_b") == str(cached)


def test_without_network_one_line_says_where_groundingdino_is(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refuses(["https://huggingface.co/ShilongLiu/GroundingDINO", "groundingdino_swint_ogc.pth", "--dino FILE"],
            masks.fetch_dino)
