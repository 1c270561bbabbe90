package org.mobilemm

/** A decoded picture, read row by row, so that a phone's photograph is never held twice. */
interface Raster {
    val width: Int
    val height: Int

    /** Row `y` as 0xAARRGGBB, not premultiplied, into the first `width` places. */
    fun row(
        y: Int,
        into: IntArray,
    )
}

/** A picture in an array, row by row as 0xAARRGGBB. */
class PixelRaster(override val width: Int, override val height: Int, private val pixels: IntArray) : Raster {
    init {
        require(pixels.size == width * height) { "${pixels.size} pixels are not $width×$height" }
    }

    override fun row(
        y: Int,
        into: IntArray,
    ) {
        pixels.copyInto(into, 0, y * width, (y + 1) * width)
    }

    /** The picture upright, by the EXIF orientation that its camera noted: 1 to 8; others are left as they are. */
    fun upright(orientation: Int): PixelRaster {
        if (orientation !in 2..8) return this
        val turned = orientation >= 5
        val newWidth = if (turned) height else width
        val newHeight = if (turned) width else height
        val found = IntArray(pixels.size)
        for (y in 0 until newHeight) {
            for (x in 0 until newWidth) {
                val (fromX, fromY) =
                    when (orientation) {
                        2 -> (width - 1 - x) to y
                        3 -> (width - 1 - x) to (height - 1 - y)
                        4 -> x to (height - 1 - y)
                        5 -> y to x
                        6 -> y to (height - 1 - x)
                        7 -> (width - 1 - y) to (height - 1 - x)
                        else -> (width - 1 - y) to x
                    }
                found[y * newWidth + x] = pixels[fromY * width + fromX]
            }
        }
        return PixelRaster(newWidth, newHeight, found)
    }
}

/** How a camera was held, as a JPEG's EXIF block says. Source: EXIF 2.32, section 4.6.4, tag 274. */
object Orientation {
    private const val TAG = 0x0112

    /** 1 to 8; 1 where nothing is said, or what is said is damaged. */
    fun of(encoded: ByteArray): Int =
        try {
            find(encoded)?.takeIf { it in 1..8 } ?: 1
        } catch (_: IndexOutOfBoundsException) {
            1
        }

    private fun find(data: ByteArray): Int? {
        if (short(data, 0, true) != 0xffd8) return null
        var at = 2
        while (data[at] == 0xff.toByte()) {
            val marker = data[at + 1].toInt() and 0xff
            val length = short(data, at + 2, true)
            val isExif = marker == 0xe1 && String(data, at + 4, 6, Charsets.ISO_8859_1) == "Exif\u0000\u0000"
            if (isExif) return inTiff(data, at + 10)
            if (marker == 0xda) return null
            at += 2 + length
        }
        return null
    }

    private fun inTiff(
        data: ByteArray,
        start: Int,
    ): Int? {
        val big = short(data, start, true) == 0x4d4d
        val table = start + (short(data, start + 4, big) shl 16 or short(data, start + 6, big)).let { if (big) it else swap(it) }
        for (index in 0 until short(data, table, big)) {
            val entry = table + 2 + 12 * index
            if (short(data, entry, big) == TAG) return short(data, entry + 8, big)
        }
        return null
    }

    private fun swap(value: Int) = value ushr 16 or (value shl 16)

    private fun short(
        data: ByteArray,
        at: Int,
        big: Boolean,
    ): Int {
        val one = data[at].toInt() and 0xff
        val two = data[at + 1].toInt() and 0xff
        return if (big) one shl 8 or two else two shl 8 or one
    }
}
