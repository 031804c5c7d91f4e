"""What an OME-XML says of the images in its file: which of them is the slide, and how large its pixels are.

An OME-TIFF may hold several images (slide, macro, label, regions), each with a physical size of its own. Every figure
is taken from the element of the image that is read, never from the first that the text happens to name.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from slidemake.core.failures import SlideFailure
from slidemake.slides.formats.tiff_index import UM_PER_UNIT, TiffIndex

LONGEST_XML = 64 << 20  # characters
FLUORESCENCE = re.compile(r"DAPI|Hoechst|FITC|Cy[357]\b|EmissionWavelength=|<Fluor|Fluor=", re.IGNORECASE)
NOT_THE_SLIDE = re.compile(r"\b(label|macro|overview|thumbnail|barcode)\b", re.IGNORECASE)


@dataclass(frozen=True)
class OmeImage:
    """One image of an OME-TIFF.

    page: number of the TIFF page that holds its first plane. planes: pages that its colours are spread over (1 or 3).
    mpp: um per px in x and y, or None. dye: what calls it a fluorescence image, or "".
    """

    name: str
    width: int
    height: int
    page: int
    planes: int
    mpp: tuple[float, float] | None
    objective: float | None
    dye: str


def parse_xml(text: str, name: str) -> Any:
    """Root element of an XML text; entities and document types are refused before they are expanded."""
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    if len(text) > LONGEST_XML:
        raise SlideFailure("unsupported", f"{name}: its XML has {len(text)} characters; at most {LONGEST_XML} are read")
    try:
        return fromstring(text, forbid_dtd=True)  # text is decoded: what it says of its encoding does not count
    except DefusedXmlException as error:
        message = f"{name}: its XML declares entities or a document type, which are not read ({type(error).__name__})"
        raise SlideFailure("unsupported", message) from error
    except (ParseError, ValueError, RecursionError) as error:
        raise SlideFailure("unreadable", f"{name}: its XML is damaged: {error}") from error


def ome_images(index: TiffIndex) -> list[OmeImage]:
    """The images of an OME-TIFF whose pixels lie in this very file, in the order of its XML."""
    root = parse_xml(index.pages[0].description, index.path.name)
    instruments = {
        element.get("ID", ""): decimal(element.get("NominalMagnification")) for element in _all(root, "Objective")
    }
    images = []
    for element in _children(root, "Image"):
        pixels = next(iter(_children(element, "Pixels")), None)
        if pixels is None:
            continue
        page = _first_page(pixels, root.get("UUID"), index.path.name)
        if page is None or not 0 <= page < len(index.pages):
            continue
        settings = next(iter(_children(element, "ObjectiveSettings")), None)
        power = instruments.get(settings.get("ID", "")) if settings is not None else None
        channels = _children(pixels, "Channel")
        samples = [int(decimal(channel.get("SamplesPerPixel")) or 1) for channel in channels] or [1]
        images.append(
            OmeImage(
                name=element.get("Name") or "",
                width=index.pages[page].width,
                height=index.pages[page].height,
                page=page,
                planes=max(1, int(decimal(pixels.get("SizeC")) or 1) // max(samples)),
                mpp=physical_size(pixels.attrib),
                objective=power if power else _only(instruments),
                dye=_dye([element.get("Name") or "", *(str(dict(channel.attrib)) for channel in channels)]),
            )
        )
    return images


def slide_image(index: TiffIndex) -> OmeImage:
    """The image that is the slide: the largest of those that are not called label, macro, overview or thumbnail.

    Where the XML speaks of no image of this file, its first page. Raises SlideFailure for an XML that cannot be read.
    """
    images = ome_images(index)
    named = [image for image in images if not NOT_THE_SLIDE.search(image.name)] or images
    if named:
        return max(named, key=lambda image: image.width * image.height)
    page = index.pages[0]
    return OmeImage("", page.width, page.height, 0, 1, None, None, "")


def other_images(index: TiffIndex, slide: OmeImage) -> tuple[list[str], bool]:
    """Names of the images that are not read, sorted, and whether one of them could be as much of a slide as this."""
    others = [image for image in ome_images(index) if image.page != slide.page]
    names = sorted({image.name or f"page {image.page}" for image in others})
    rivals = [image for image in others if not NOT_THE_SLIDE.search(image.name)]
    return names, any(4 * image.width * image.height >= slide.width * slide.height for image in rivals)


def physical_size(attributes: Any) -> tuple[float, float] | None:
    """um per px (x, y) from the attributes of a Pixels element; None where they are absent or their unit says nothing.

    A size without a unit is in um (the schema's default); a file that gives one axis alone means both.
    """
    sizes = [decimal(attributes.get(f"PhysicalSize{axis}")) for axis in "XY"]
    units = [UM_PER_UNIT.get((attributes.get(f"PhysicalSize{axis}Unit") or "um").strip()) for axis in "XY"]
    found = [size * unit if size and unit else None for size, unit in zip(sizes, units, strict=True)]
    x, y = (value if size else other for value, size, other in zip(found, sizes, found[::-1], strict=True))
    return (x, y) if x and y else None


def decimal(text: str | None) -> float | None:
    """A finite positive number, with a point or, as some programs write it, a comma; None for anything else."""
    text = (text or "").strip()
    if re.fullmatch(r"\d+,\d+([eE][+-]?\d+)?", text):
        text = text.replace(",", ".")
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _tag(element: Any) -> str:
    return str(element.tag).rsplit("}", 1)[-1]


def _children(element: Any, tag: str) -> list[Any]:
    return [child for child in element if _tag(child) == tag]


def _all(element: Any, tag: str) -> list[Any]:
    return [child for child in element.iter() if _tag(child) == tag]


def _only(instruments: dict[str, float | None]) -> float | None:
    """The one objective of the file, where an image does not say which is its own."""
    return next(iter(instruments.values())) if len(instruments) == 1 else None


def _dye(texts: list[str]) -> str:
    for text in texts:
        if found := FLUORESCENCE.search(text.replace("': '", "=")):
            return found.group(0)
    return ""


def _first_page(pixels: Any, uuid: str | None, name: str) -> int | None:
    """TIFF page of an image's first plane; None when that lies in another file, or nowhere."""
    for data in _children(pixels, "TiffData"):
        if any(int(decimal(data.get(f"First{axis}")) or 0) for axis in "CZT"):
            continue
        place = next(iter(_children(data, "UUID")), None)
        if place is not None and place.text != uuid and (place.get("FileName") or name).lower() != name.lower():
            return None
        return int(decimal(data.get("IFD")) or 0)
    return None
