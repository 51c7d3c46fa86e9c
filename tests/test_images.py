"""The image contract: what each file format becomes in RGB, by hand; tensors to pictures and back; the contact sheet."""

import io
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFont

from src import images
from src.images import from_pil, grid, measure, open_rgb, prompt_of, save, to_pil

PHOTOS = Path(__file__).parent.parent / "datas" / "photos"
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def noise(width: int, height: int) -> Image.Image:
    """Always the same noise, which does not compress: a file of it is long enough to be cut anywhere."""
    levels = torch.randint(0, 256, (height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(levels.numpy())


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


# --------------------------------------------------------------------------- tensors


def test_tensor_has_channels_first_and_the_right_pixel_in_each_corner():
    image = Image.new("RGB", (3, 2))  # width 3, height 2
    image.putpixel((2, 0), (255, 51, 0))
    tensor = from_pil(image)
    assert tensor.shape == (3, 2, 3) and tensor.dtype == torch.float32
    torch.testing.assert_close(tensor[:, 0, 2], torch.tensor([1.0, 0.2, 0.0]))  # 51 / 255
    assert tensor.sum() == pytest.approx(1.2)


def test_every_level_survives_the_round_trip():
    image = Image.frombytes("RGB", (16, 16), bytes(v for level in range(256) for v in (level, 255 - level, 7)))
    assert to_pil(from_pil(image)[None])[0].tobytes() == image.tobytes()


def test_to_pil_rounds_to_the_nearest_level_and_clamps():
    """127.4 -> 127, 127.6 -> 128; truncation, the usual mistake, would darken every picture by half a level."""
    values = torch.tensor([127.4 / 255, 127.6 / 255, -0.5, 1.5]).reshape(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert [p[0] for p in pixels(to_pil(values)[0])] == [127, 128, 0, 255]


@pytest.mark.parametrize("bad", [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, 4), torch.full((1, 3, 2, 2), float("nan"))])
def test_to_pil_refuses_wrong_shapes_and_nan(bad):
    with pytest.raises(ValueError, match="to_pil"):
        to_pil(bad)


# --------------------------------------------------------------------------- files


def test_exif_rotation_is_applied():
    """Orientation 6: the file's left column is the top row of the picture, right to left... shown here by one red pixel."""
    lying = Image.new("RGB", (32, 16), WHITE)
    lying.paste(RED, (0, 0, 8, 8))  # top left of the file
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to view: top left goes to top right
    upright = open_rgb(encoded(lying, "PNG", exif=exif))
    assert upright.size == (16, 32)
    assert upright.getpixel((15, 0)) == RED and upright.getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("entry", [(0x0128, 2, b"abc\0"), (0x0131, 5, b"\0\0\0\x08")], ids=["unit as text", "software as number"])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_one_odd_tag_costs_neither_the_picture_nor_its_rotation(entry, form):
    """EXIF by hand, orientation 6 beside a tag of another type than its own: cameras and editors write such."""
    tag, kind, value = entry
    entries = struct.pack(">HHI4s", 0x0112, 3, 1, b"\0\6\0\0") + struct.pack(">HHI4s", tag, kind, 4 if kind == 2 else 1, value)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4)
    odd = encoded(noise(61, 37), form, exif=exif)
    plain = Image.Exif()
    plain[0x0112] = 6
    assert measure(odd) == (37, 61)
    assert open_rgb(odd).tobytes() == open_rgb(encoded(noise(61, 37), form, exif=plain)).tobytes()


def test_damaged_exif_leaves_an_upright_picture():
    assert open_rgb(encoded(noise(61, 37), "PNG", exif=b"Exif\0\0MM\0*\xff\xff")).tobytes() == noise(61, 37).convert("RGB").tobytes()


def test_alpha_lies_on_white():
    """Half transparent black over white: 255 * (1 - 128/255) = 127; wholly transparent red is white."""
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 128), (255, 0, 0, 0), (0, 0, 255, 255)])
    assert pixels(open_rgb(encoded(image))) == [(127, 127, 127), WHITE, BLUE]


def test_grey_with_alpha_lies_on_white():
    image = Image.new("LA", (2, 1))
    image.putdata([(0, 255), (0, 0)])
    assert pixels(open_rgb(encoded(image))) == [(0, 0, 0), WHITE]


def test_palette_and_its_transparent_entry():
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    assert pixels(open_rgb(encoded(image))) == [RED, GREEN, BLUE]
    assert pixels(open_rgb(encoded(image, transparency=1))) == [RED, WHITE, BLUE]
    assert pixels(open_rgb(encoded(image, "GIF", transparency=1))) == [RED, WHITE, BLUE]


def test_a_transparent_colour_of_an_rgb_picture_is_white():
    image = Image.new("RGB", (2, 1))
    image.putdata([RED, GREEN])
    assert pixels(open_rgb(encoded(image, transparency=GREEN))) == [RED, WHITE]


def test_32_bit_integers_are_refused_and_not_black():
    """Read as 16 bits, a TIFF of 0 to 255 would be 0 to 1."""
    wide = Image.frombytes("I", (256, 1), struct.pack("<256i", *range(256)))
    with pytest.raises(ValueError, match="32-bit greyscale has no agreed white level"):
        open_rgb(encoded(wide, "TIFF"))


def test_16_bit_is_scaled_not_clipped():
    """65535 is white, 0x8000 is the middle, 257 * k is exactly k: a clipped conversion would make all but the first white."""
    data = struct.pack("<5H", 0, 257, 0x8000, 257 * 200, 65535)
    file = encoded(Image.frombytes("I;16", (5, 1), data))
    assert [p[0] for p in pixels(open_rgb(file))] == [0, 1, 128, 200, 255]
    older = Image.new("I", (5, 1))  # what earlier versions of Pillow opened such a file as
    older.putdata([0, 257, 0x8000, 257 * 200, 65535])
    assert [p[0] for p in pixels(open_rgb(older))] == [0, 1, 128, 200, 255]
    tiff = encoded(Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 0x1234, 0xFFFF)), "TIFF")
    assert [p[0] for p in pixels(open_rgb(tiff))] == [0x12, 0xFF]


@pytest.mark.parametrize("mode, value", [("F", 0.5), ("I", 2**20)])
def test_brightness_without_a_known_white_level_is_refused(mode, value):
    with pytest.raises(ValueError, match="sun.tif.*white level"):
        open_rgb(encoded(Image.new(mode, (2, 2), value), "TIFF"), "sun.tif")


def test_cmyk_jpeg_keeps_its_colours():
    """Cyan and magenta ink make blue; an Adobe file whose inversion was missed would come out yellow."""
    file = encoded(Image.new("CMYK", (16, 16), (255, 255, 0, 0)), "JPEG", quality=95)
    red, green, blue = open_rgb(file).getpixel((8, 8))
    assert red < 30 and green < 30 and blue > 225


def test_1_bit_and_plain_grey():
    assert pixels(open_rgb(encoded(Image.new("1", (1, 1), 1)))) == [WHITE]
    assert pixels(open_rgb(encoded(Image.new("L", (1, 1), 77)))) == [(77, 77, 77)]


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_rgb(tmp_path / "a.gif").getpixel((0, 0)) == RED


def test_an_open_picture_is_not_changed():
    image = Image.new("RGB", (2, 2), RED)
    open_rgb(image).putpixel((0, 0), BLUE)
    assert image.getpixel((0, 0)) == RED


def damaged() -> dict[str, bytes]:
    photo = (PHOTOS / "cat.jpg").read_bytes()
    png = bytearray(encoded(noise(64, 64)))
    png[200] ^= 255  # inside the compressed pixels
    header = struct.pack(">II5B", 100000, 100000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return {
        "empty.jpg": b"",
        "text.png": b"not a picture",
        "short.jpg": photo[: len(photo) // 2],
        "flipped.png": bytes(png),
        "bomb.png": b"\x89PNG\r\n\x1a\n" + chunk,
        "short.webp": (PHOTOS / "galaxies.webp").read_bytes()[:5000],
        "short.gif": encoded(noise(64, 64), "GIF")[:300],
        "short.tif": encoded(noise(64, 64), "TIFF")[:300],
        "short.bmp": encoded(noise(64, 64), "BMP")[:300],
    }


@pytest.mark.parametrize("name", damaged())
def test_a_broken_file_is_a_value_error_with_its_name(name, tmp_path):
    (tmp_path / name).write_bytes(damaged()[name])
    with pytest.raises(ValueError, match=f"cannot read .*{name}: .+"):
        open_rgb(tmp_path / name)
    with pytest.raises(ValueError, match=f"cannot read {name}: (?!.*BytesIO)"):
        open_rgb(damaged()[name], name)
    with pytest.raises(ValueError, match=f"cannot read {name}: .+"):  # the quick look sees it too
        measure(damaged()[name], name)


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"mode": "CMYK"}, {"mode": "L"}])
def test_measure_is_the_size_of_the_opened_picture(tag, options):
    options = dict(options)
    exif = Image.Exif()
    exif[0x0112] = tag
    file = encoded(noise(61, 37).convert(options.pop("mode", "RGB")), "JPEG", exif=exif, **options)
    assert measure(file) == open_rgb(file).size == ((37, 61) if tag > 4 else (61, 37))
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(ValueError, match="[Tt]runcated"):
            measure(file[: int(len(file) * share)])


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("form, options", [
    ("TIFF", {"compression": "raw"}), ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"}), ("PNG", {}), ("WEBP", {}),
    ("MPO", {}), ("AVIF", {}),
])  # fmt: skip
def test_measure_turns_every_format_once(tag, form, options):
    """Pillow turns a TIFF or an AVIF itself while it loads, says so or not before, and leaves the others to us."""
    exif = Image.Exif()
    exif[0x0112] = tag
    file = encoded(noise(61, 37).convert("RGB"), form, exif=exif, **options)
    assert measure(file) == open_rgb(file).size == ((37, 61) if tag > 4 else (61, 37))


def test_a_missing_file_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*gone.png"):
        open_rgb(tmp_path / "gone.png")


def test_the_shipped_photographs_are_the_awkward_ones():
    modes = {}
    for file in sorted(PHOTOS.iterdir()):
        if file.suffix in (".jpg", ".png", ".webp"):
            with Image.open(file) as image:
                modes[file.name] = (image.mode, image.getexif().get(0x0112, 1))
            assert open_rgb(file).mode == "RGB" and measure(file) == open_rgb(file).size
    assert {mode for mode, _ in modes.values()} >= {"RGB", "L", "P", "RGBA", "CMYK", "I;16"}
    assert 6 in {orientation for _, orientation in modes.values()}
    assert open_rgb(PHOTOS / "shuttle.jpg").size == (239, 450)  # stored lying, seen upright
    assert sum(file.stat().st_size for file in PHOTOS.iterdir()) < 1.2e6


# --------------------------------------------------------------------------- the contact sheet


def find(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    """Bounding box (left, top, right, bottom) of a colour."""
    at = [(x, y) for y in range(sheet.height) for x in range(sheet.width) if sheet.getpixel((x, y)) == colour]
    return (min(x for x, _ in at), min(y for _, y in at), max(x for x, _ in at) + 1, max(y for _, y in at) + 1) if at else None


def test_small_pictures_are_enlarged_without_smoothing():
    """A 64 px cell becomes 128 px: exactly four pixels of each, none in between."""
    picture = Image.new("RGB", (64, 64), RED)
    picture.putpixel((3, 5), BLUE)
    sheet = grid([picture], 1)
    left, top, right, bottom = find(sheet, BLUE)
    assert (right - left, bottom - top) == (2, 2)
    box = find(sheet, RED)
    assert (box[2] - box[0], box[3] - box[1]) == (128, 128) and (left - box[0], top - box[1]) == (6, 10)
    assert {p for p in pixels(sheet)} == {RED, BLUE, WHITE}


@pytest.mark.parametrize(
    "side, scale, wanted", [(16, None, 128), (64, None, 128), (100, None, 200), (200, None, 200), (64, 1, 64), (64, 3, 192)]
)
def test_a_cell_is_at_least_128_px_unless_told_otherwise(side, scale, wanted):
    box = find(grid([Image.new("RGB", (side, side), RED)], 1, scale=scale), RED)
    assert box[2] - box[0] == wanted


def test_larger_pictures_are_shrunk_in_the_grid_alone():
    """600 x 400 to 300 x 200; the smaller one stays as it is, and so do the pictures that were handed over."""
    large, small = Image.new("RGB", (600, 400), RED), Image.new("RGB", (200, 200), BLUE)
    sheet = grid([large, small], 2, largest=300)
    sizes = [(box[2] - box[0], box[3] - box[1]) for box in (find(sheet, RED), find(sheet, BLUE))]
    assert sizes == [(300, 200), (200, 200)] and large.size == (600, 400)


def test_order_is_row_by_row_with_white_between():
    colours = [RED, GREEN, BLUE]
    sheet = grid(torch.stack([from_pil(Image.new("RGB", (64, 64), c)) for c in colours]), columns=2)
    red, green, blue = (find(sheet, colour) for colour in colours)
    assert red[1] == green[1] and green[0] - red[2] >= 4  # same row, a gutter apart
    assert blue[0] == red[0] and blue[1] - red[3] >= 4  # second row
    assert red[0] >= 4 and sheet.height - blue[3] >= 4  # a margin all round


def test_pictures_of_different_sizes_are_centred_in_their_cells():
    sheet = grid([Image.new("RGB", (200, 100), RED), Image.new("RGB", (100, 200), BLUE)], 2, scale=1)
    red, blue = find(sheet, RED), find(sheet, BLUE)
    assert (red[1] + red[3]) == (blue[1] + blue[3])
    assert (blue[0] + blue[2]) / 2 - (red[0] + red[2]) / 2 == 200 + 200 // 24  # cell and gutter


def test_labels_take_room_and_leave_the_pictures_alone():
    picture = Image.new("RGB", (64, 64), RED)
    plain = grid([picture] * 4, 2)
    sheet = grid([picture] * 4, 2, row_labels=["a red circle", "b"], column_labels=["base", "tuned"], labels=list("wxyz"))
    assert sheet.width > plain.width and sheet.height > plain.height
    count = sum(p == RED for p in pixels(sheet))
    assert count == 4 * 128 * 128  # no letter on any of them
    dark = [(x, y) for y in range(sheet.height) for x in range(sheet.width) if sum(sheet.getpixel((x, y))) < 200]
    left, top, _, _ = find(sheet, RED)
    assert any(x < left for x, y in dark) and any(y < top for x, y in dark)


def test_every_label_stands_below_its_own_picture():
    """Two rows; the first label takes more lines. Neither may be pushed over the next picture, or off the sheet."""
    sheet = grid([Image.new("RGB", (128, 128), colour) for colour in (RED, BLUE)], 1, labels=["a cat that sits on a mat", "w"])
    first, second = find(sheet, RED), find(sheet, BLUE)
    plain = find(grid([Image.new("RGB", (128, 128), RED)], 1), RED)
    assert first == plain, "no label above the first picture moves it"
    for above, below in ((first[3], second[1]), (second[3], sheet.height)):
        assert any(sum(sheet.getpixel((x, y))) < 200 for y in range(above, below) for x in range(sheet.width))


def test_long_labels_are_wrapped_and_then_cut():
    picture = Image.new("RGB", (128, 128), RED)
    normal = grid([picture], 1, labels=["a cat"])
    wrapped = grid([picture], 1, labels=["a cat that sits on a mat"])
    endless, same = (grid([picture], 1, labels=[" ".join(["a cat that sits on a mat"] * n)]) for n in (10, 100))
    assert normal.height < wrapped.height < endless.height == same.height
    assert normal.width == wrapped.width == endless.width
    assert grid([picture], 1, labels=["x" * 500]).size == endless.size  # one word wider than the picture


def test_labels_of_any_text_do_not_crash():
    picture = Image.new("RGB", (64, 64), RED)
    for text in ("", "  ", "a\nb\tc", "日本語のプロンプト", "\U0001f389", "../../etc/passwd", "%s {0}"):
        grid([picture], 1, labels=[text], row_labels=[text], column_labels=[text])


@pytest.mark.parametrize("wrong", [{"row_labels": ["a"]}, {"column_labels": ["a"]}, {"labels": ["a", "b"]}])
def test_a_wrong_number_of_labels_is_refused(wrong):
    with pytest.raises(ValueError, match="label"):
        grid([Image.new("RGB", (8, 8))] * 4, 2, **wrong)
    with pytest.raises(ValueError, match="at least one picture"):
        grid([], 2)


def test_a_prompt_is_read_back_from_our_own_files_alone(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    picture = Image.new("RGB", (4, 4))
    save(picture, tmp_path / "ours.png", "a fox, ünïcode 🙂\n2", seed="3")
    assert prompt_of(tmp_path / "ours.png") == "a fox, ünïcode 🙂\n2" and Image.open(tmp_path / "ours.png").text["seed"] == "3"
    for name, texts in {"old.png": {"prompt": "a fox", "settings": "{}"}, "other.png": {"prompt": "a fox", "Software": "NovelAI"}}.items():
        info = PngInfo()
        for keyword, text in texts.items():
            info.add_itxt(keyword, text)
        picture.save(tmp_path / name, pnginfo=info)
    picture.save(tmp_path / "bare.jpg")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = {path.name: prompt_of(path) for path in tmp_path.iterdir()}
    assert found == found | {"old.png": "a fox", "other.png": "", "bare.jpg": "", "broken.png": ""}


def test_labels_are_set_in_a_font_that_has_their_letters():
    """A font draws what it does not have as one and the same box, here that of a character that is assigned to nothing."""
    for text in ("schöner Käse, naïve café", "κόσμος", "тест → —"):
        font = images._font(text, 20)
        box = bytes(font.getmask("\u0378"))
        assert all(bytes(font.getmask(letter)) != box for letter in text if letter != " ")
    assert images._font("a red star", 20).getname() == ImageFont.load_default(size=20).getname()  # what it was for all others
