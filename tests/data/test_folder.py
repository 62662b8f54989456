from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from zoo.data.folder import Folder, FolderConfig
from zoo.data.sample import BlankImages, data_hash, read
from zoo.errors import ConfigError, DataError

NAMES = [f"pictures/{i:02}.png" for i in range(20)]


def save_images(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12 + number, 10), (number * 20 % 256, 100, 50)).save(path)


def write_rows(root: Path, rows: list[object], name: str = "captions.jsonl") -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def make(root: Path, **fields: object) -> Folder:
    return FolderConfig(root=str(root), captions="captions.jsonl", **fields).open(None)  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_images(tmp_path, NAMES)
    write_rows(tmp_path, [{"image": n, "caption": f"picture {i}"} for i, n in enumerate(NAMES)])
    return tmp_path


def all_ids(source: Folder) -> list[str]:
    return sorted(i for split in ("train", "val", "test") for i in source.ids(split))


def test_rows_of_one_image_are_joined_and_images_are_rgb(root: Path) -> None:
    rows = [{"image": NAMES[0], "caption": ["one", "two"]}, {"image": NAMES[0], "caption": "three"}]
    write_rows(root, [*rows, {"image": NAMES[0], "caption": "two"}])
    source = make(root)
    sample = source.sample(NAMES[0])
    assert all_ids(source) == [NAMES[0]]
    assert sample.texts == ("one", "two", "three")
    assert sample.image is not None
    assert (sample.image.mode, sample.image.size) == ("RGB", (12, 10))


def test_csv_with_other_columns_ids_and_splits(root: Path) -> None:
    text = 'file,text,key,part\npictures/00.png,"a, b",k0,train\npictures/01.png,c,k1,test\npictures/02.png,d,k2,val\n'
    (root / "list.csv").write_text("\ufeff" + text, encoding="utf-8")
    source = FolderConfig(
        root=str(root),
        captions="list.csv",
        image_column="file",
        text_column="text",
        id_column="key",
        split_column="part",
    ).open(None)
    assert [source.ids(s) for s in ("train", "val", "test")] == [["k0"], ["k2"], ["k1"]]
    assert source.sample("k0").texts == ("a, b",)


def test_without_captions_the_file_names_are_the_captions(tmp_path: Path) -> None:
    save_images(tmp_path, ["red_cup.png", "deep/two-dogs.jpg"])
    source = FolderConfig(root=str(tmp_path)).open(None)
    assert {i: source.sample(i).texts[0] for i in all_ids(source)} == {
        "deep/two-dogs.jpg": "two dogs",
        "red_cup.png": "red cup",
    }


def test_hashed_splits_do_not_move_when_images_are_added(root: Path) -> None:
    before = make(root, val_fraction=0.2, test_fraction=0.3)
    old = {i: s for s in ("train", "val", "test") for i in before.ids(s)}
    assert all(before.ids(s) for s in ("train", "val", "test"))
    save_images(root, ["new/a.png"])
    with (root / "captions.jsonl").open("a") as file:
        file.write(json.dumps({"image": "new/a.png", "caption": "new"}) + "\n")
    after = make(root, val_fraction=0.2, test_fraction=0.3)
    new = {i: s for s in ("train", "val", "test") for i in after.ids(s)}
    assert {i: new[i] for i in old} == old
    assert data_hash(before, "train") != data_hash(after, "train")


def test_hash_sees_changed_texts(root: Path) -> None:
    before = data_hash(make(root), "train")
    write_rows(root, [{"image": n, "caption": f"picture {i + 1}"} for i, n in enumerate(NAMES)])
    assert data_hash(make(root), "train") != before


def test_a_missing_folder_and_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"photoz.*does not exist; did you mean photos"):
        FolderConfig(root=str(tmp_path / "photoz")).open(None)
    with pytest.raises(DataError, match=r"no images in .*photos.*\.png"):
        FolderConfig(root=str(tmp_path / "photos")).open(None)
    with pytest.raises(ConfigError, match=r"data\.root"):
        FolderConfig().open(None)
    with pytest.raises(ConfigError, match="leave something to train on"):
        FolderConfig(root=str(tmp_path), val_fraction=0.5, test_fraction=0.5).open(None)


def test_wrong_captions_files(root: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean captions\.jsonl"):
        FolderConfig(root=str(root), captions="caption.jsonl").open(None)
    with pytest.raises(DataError, match="no column 'captoin'; did you mean caption"):
        make(root, text_column="captoin")
    (root / "captions.jsonl").write_text("")
    with pytest.raises(DataError, match="has no rows"):
        make(root)
    (root / "captions.txt").write_text("x")
    with pytest.raises(DataError, match=r"must end in \.jsonl or \.csv"):
        FolderConfig(root=str(root), captions="captions.txt").open(None)
    (root / "captions.csv").write_bytes(b"image,caption\npictures/00.png,caf\xe9\n")
    with pytest.raises(DataError, match="UTF-8"):
        FolderConfig(root=str(root), captions="captions.csv").open(None)


def test_bad_rows_are_logged_skipped_and_counted_up_to_the_limit(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = {"image": NAMES[0], "caption": "fine"}
    bad = ["{not json", "[1]", {"image": "pictures/none.png", "caption": "x"}, {"image": NAMES[1], "caption": 3}]
    write_rows(root, [good, *bad])
    source = make(root, max_bad=4)
    assert all_ids(source) == [NAMES[0]]
    assert len(source.bad) == 4
    assert "captions.jsonl:4" in caplog.text
    assert "'pictures/none.png' is missing" in caplog.text
    with pytest.raises(
        DataError, match=r"4 samples cannot be read, more than max_bad=3; the first is 'captions.jsonl:2'"
    ):
        make(root, max_bad=3)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret.png", "pictures/../../x.png", "C:\\x.png", "..\\x.png"])
def test_paths_out_of_the_folder_are_refused(root: Path, path: str) -> None:
    write_rows(root, [{"image": path, "caption": "x"}])
    with pytest.raises(DataError, match="refused"):
        make(root)


def test_links_out_of_the_folder_are_refused(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    save_images(outside, ["secret.png"])
    (root / "pictures" / "link.png").symlink_to(outside / "secret.png")
    write_rows(root, [{"image": "pictures/link.png", "caption": "x"}])
    with pytest.raises(DataError, match="a link that leads out"):
        make(root)
    with pytest.raises(DataError, match="a link that leads out"):
        FolderConfig(root=str(root)).open(None)


def test_damaged_images_are_skipped_up_to_the_limit(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.effect_noise((64, 64), 50).save(root / NAMES[3])
    (root / NAMES[3]).write_bytes((root / NAMES[3]).read_bytes()[:200])
    (root / NAMES[4]).write_bytes(b"no image at all")
    (root / NAMES[5]).write_bytes(b"")
    source = make(root, max_bad=3)
    ids = all_ids(source)
    assert [s.id for s in read(source, ids)] == [i for i in ids if i not in NAMES[3:6]]
    assert NAMES[4] in caplog.text
    with pytest.raises(DataError, match=r"3 samples cannot be read, more than max_bad=2"):
        list(read(make(root, max_bad=2), ids))


def test_a_decompression_bomb_is_refused_by_its_header(root: Path) -> None:
    Image.new("RGB", (400, 300)).save(root / NAMES[0])
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match="400x300 pixels are more than max_pixels=100000"):
        make(root, max_pixels=100_000).sample(NAMES[0])
    assert before == Image.MAX_IMAGE_PIXELS


def test_one_id_for_two_images_is_refused(root: Path) -> None:
    write_rows(root, [{"image": n, "caption": "x", "key": "same"} for n in NAMES[:2]])
    with pytest.raises(DataError, match="'same' is used for two images"):
        make(root, id_column="key")


def test_blank_images_keep_their_size(root: Path) -> None:
    source = FolderConfig(root=str(root), captions="captions.jsonl", blank_images=True).build()
    assert isinstance(source, BlankImages)
    image = source.sample(NAMES[2]).image
    assert image is not None
    assert image.size == (14, 10)
    assert image.getextrema() == ((255, 255),) * 3
    assert not hasattr(source, "images")
