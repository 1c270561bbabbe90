package org.mobilemm

import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Test
import java.io.File

class ImageProcessorTest {
    private fun rule(of: Map<String, Any?>) =
        ImageRule(
            of.int("height"),
            of.int("width"),
            of.text("strategy"),
            of.text("filter"),
            of.ints("pad_color"),
            (of["shortest_edge"] as Long?)?.toInt(),
            null,
        )

    @Test fun `pixels are Pillow's, bit for bit`() {
        val cases = Vectors.objects("images.json")
        assertTrue(cases.size >= 60)
        for (case in cases) {
            val width = case.int("width")
            val height = case.int("height")
            val bytes = Vectors.file("images/${case.text("rgba")}").readBytes()
            val pixels =
                IntArray(width * height) { index ->
                    val (red, green, blue, alpha) = List(4) { bytes[4 * index + it].toInt() and 255 }
                    alpha shl 24 or (red shl 16) or (green shl 8) or blue
                }
            @Suppress("UNCHECKED_CAST")
            val rule = case["rule"] as Map<String, Any?>
            val found = ImageProcessor(rule(rule)).toPixels(PixelRaster(width, height, pixels))
            assertArrayEquals("${width}x$height $rule", Vectors.file("images/${case.text("pixels")}").readBytes(), found)
        }
    }

    @Test fun `pictures are turned upright as their camera noted`() {
        val all = Vectors.map("orientations.json")
        val raw = Vectors.file("images/turned.rgb").readBytes()
        val picture = raster(raw, all.int("width"), all.int("height"))
        for (case in all.objects("turned")) {
            val orientation = case.int("orientation")
            assertEquals(orientation, Orientation.of(Vectors.file("images/${case.text("file")}").readBytes()))
            @Suppress("UNCHECKED_CAST")
            val right = (all["upright"] as Map<String, Map<String, Any?>>).getValue(orientation.toString())
            val wanted = raster(Vectors.file("images/${right.text("file")}").readBytes(), right.int("width"), right.int("height"))
            assertArrayEquals("orientation $orientation", pixels(wanted), pixels(picture.upright(orientation)))
        }
    }

    @Test fun `damaged metadata is no orientation`() {
        val jpeg = Vectors.file("images/turned-6.jpg").readBytes()
        for (length in 0 until minOf(jpeg.size, 120)) assertTrue(Orientation.of(jpeg.copyOf(length)) in setOf(1, 6))
        assertEquals(1, Orientation.of(File(Vectors.folder, "pictures/0.png").readBytes()))
    }

    private fun raster(
        rgb: ByteArray,
        width: Int,
        height: Int,
    ) = PixelRaster(
        width,
        height,
        IntArray(width * height) { index ->
            val (red, green, blue) = List(3) { rgb[3 * index + it].toInt() and 255 }
            255 shl 24 or (red shl 16) or (green shl 8) or blue
        },
    )

    private fun pixels(picture: Raster): IntArray {
        val row = IntArray(picture.width)
        return (0 until picture.height).flatMap { y -> picture.row(y, row).let { row.toList() } }.toIntArray()
    }
}
