package org.mobilemm

import kotlin.math.PI
import kotlin.math.abs
import kotlin.math.ceil
import kotlin.math.sin

/**
 * Pictures → `pixels` of the vision part, by the manifest's rule, bit for bit as Pillow's `resize` computes them.
 *
 * Source: Pillow's documentation of its filters; its arithmetic is fixed-point with 22 bits, rows before columns.
 */
class ImageProcessor(private val rule: ImageRule) {
    /** uint8 (3, height, width), row by row. Raises [MobileMMError] for a picture that is too large or too narrow. */
    fun toPixels(picture: Raster): ByteArray {
        if (picture.width.toLong() * picture.height > MAX_PIXELS || maxOf(picture.width, picture.height) > MAX_SIDE) {
            throw MobileMMError(
                "a picture of ${picture.width}×${picture.height} is more than the limit of $MAX_PIXELS pixels, $MAX_SIDE a" +
                    " side; scale it down first",
            )
        }
        val rows = OpaqueRows(picture)
        return when (rule.strategy) {
            "pad" -> {
                val side = maxOf(picture.width, picture.height)
                val color = rule.padColor
                planar(resize(Padded(rows, side, color[0] shl 16 or (color[1] shl 8) or color[2]), rule.width, rule.height))
            }
            "crop" -> {
                val (width, height) = shortestEdge(picture.width, picture.height, rule.shortestEdge ?: minOf(rule.height, rule.width))
                if (width.toLong() * height > MAX_PIXELS) {
                    throw MobileMMError("a picture of ${picture.width}×${picture.height} is too narrow; crop it first")
                }
                planar(cropped(resize(rows, width, height), rule.width, rule.height))
            }
            else -> planar(resize(rows, rule.width, rule.height))
        }
    }

    private fun shortestEdge(
        width: Int,
        height: Int,
        edge: Int,
    ): Pair<Int, Int> {
        val other = (edge.toLong() * maxOf(width, height) / minOf(width, height).toDouble()).toInt()
        return if (width <= height) edge to other else other to edge
    }

    private fun cropped(
        picture: Rgb,
        width: Int,
        height: Int,
    ): Rgb {
        val left = (picture.width - width).floorDiv(2)
        val top = (picture.height - height).floorDiv(2)
        val found = Rgb(width, height)
        for (y in 0 until height) {
            for (x in 0 until width) {
                val inside = x + left in 0 until picture.width && y + top in 0 until picture.height
                if (!inside) continue
                val from = 3 * ((y + top) * picture.width + x + left)
                picture.bytes.copyInto(found.bytes, 3 * (y * width + x), from, from + 3)
            }
        }
        return found
    }

    private fun planar(picture: Rgb): ByteArray {
        val plane = picture.width * picture.height
        return ByteArray(3 * plane) { picture.bytes[3 * (it % plane) + it / plane] }
    }

    private fun resize(
        source: Raster,
        width: Int,
        height: Int,
    ): Rgb {
        if (rule.filter == "nearest") return nearest(source, width, height)
        val (support, filter) = FILTERS.getValue(rule.filter)
        val columns = if (width != source.width) Weights(source.width, width, support, filter) else null
        val rows = if (height != source.height) Weights(source.height, height, support, filter) else null
        // The order shows in the last bit. Pillow takes a picture that shrinks far more in height by columns first,
        // since version 13; it can only be one that is not padded to a square.
        val columnsFirst = source.height > height && source.height - height > 2 * (source.width - width)
        if (columnsFirst && rows != null) return across(rows.vertical(across(source, null)), columns)
        val between = across(source, columns)
        return rows?.vertical(between) ?: between
    }

    /** Each row resized by these weights, or as it is. */
    private fun across(
        source: Raster,
        columns: Weights?,
    ): Rgb {
        val found = Rgb(columns?.size ?: source.width, source.height)
        val row = IntArray(source.width)
        val padded = source as? Padded
        var margin = -1
        for (y in 0 until source.height) {
            val isMargin = padded?.isMargin(y) ?: false
            if (isMargin && margin >= 0) {
                // All of one color, and all alike.
                found.copyRow(margin, y)
                continue
            }
            if (isMargin) margin = y
            source.row(y, row)
            if (columns == null) found.put(y, row) else columns.horizontal(row, found, y)
        }
        return found
    }

    private fun nearest(
        source: Raster,
        width: Int,
        height: Int,
    ): Rgb {
        val columns = places(source.width, width)
        val rows = places(source.height, height)
        val found = Rgb(width, height)
        val row = IntArray(source.width)
        val picked = IntArray(width)
        for (y in 0 until height) {
            source.row(rows[y], row)
            for (x in 0 until width) picked[x] = row[columns[x]]
            found.put(y, picked)
        }
        return found
    }

    /** The positions that `nearest` reads, their step added up as Pillow does. */
    private fun places(
        from: Int,
        to: Int,
    ): IntArray {
        val step = from.toDouble() / to
        var at = step * 0.5
        return IntArray(to) { at.toInt().coerceAtMost(from - 1).also { at += step } }
    }

    companion object {
        /** Width × height; a 64-megapixel camera still fits. */
        const val MAX_PIXELS = 64L shl 20

        /** Pictures are padded to a square: a strip of 1×20000 would become 400 megapixels. */
        const val MAX_SIDE = 16_384

        private val FILTERS: Map<String, Pair<Double, (Double) -> Double>> =
            mapOf("bilinear" to (1.0 to ::bilinear), "bicubic" to (2.0 to ::bicubic), "lanczos" to (3.0 to ::lanczos))
    }
}

private fun bilinear(x: Double) = if (abs(x) < 1) 1 - abs(x) else 0.0

private fun bicubic(given: Double): Double {
    val x = abs(given)
    val a = -0.5
    return when {
        x < 1 -> ((a + 2) * x - (a + 3)) * x * x + 1
        x < 2 -> (((x - 5) * x + 8) * x - 4) * a
        else -> 0.0
    }
}

private fun lanczos(x: Double) = if (x >= -3 && x < 3) sinc(x) * sinc(x / 3) else 0.0

private fun sinc(x: Double) = if (x == 0.0) 1.0 else sin(x * PI) / (x * PI)

/** A picture of interleaved red, green and blue bytes. */
private class Rgb(override val width: Int, override val height: Int) : Raster {
    val bytes = ByteArray(3 * width * height)

    override fun row(
        y: Int,
        into: IntArray,
    ) {
        var at = 3 * width * y
        for (x in 0 until width) {
            val red = bytes[at++].toInt() and 255
            val green = bytes[at++].toInt() and 255
            into[x] = red shl 16 or (green shl 8) or (bytes[at++].toInt() and 255)
        }
    }

    fun copyRow(
        from: Int,
        to: Int,
    ) {
        bytes.copyInto(bytes, 3 * width * to, 3 * width * from, 3 * width * (from + 1))
    }

    fun put(
        y: Int,
        row: IntArray,
    ) {
        var at = 3 * width * y
        for (x in 0 until width) {
            val color = row[x]
            bytes[at++] = (color shr 16).toByte()
            bytes[at++] = (color shr 8).toByte()
            bytes[at++] = color.toByte()
        }
    }
}

/** Its transparency laid on white, as Pillow's `alpha_composite` computes it. */
private class OpaqueRows(private val picture: Raster) : Raster by picture {
    override fun row(
        y: Int,
        into: IntArray,
    ) {
        picture.row(y, into)
        for (x in 0 until width) {
            val alpha = into[x] ushr 24
            if (alpha == 255) continue
            val over = if (alpha == 0) 0 else ((alpha * 255 * 255) shl 7) / 65025
            val under = (255 shl 7) - over
            var color = 0
            for (shift in intArrayOf(16, 8, 0)) {
                val sum = (into[x] shr shift and 255) * over + 255 * under + (0x80 shl 7)
                color = color or ((((sum shr 8) + sum) shr 8 shr 7) shl shift)
            }
            into[x] = color
        }
    }
}

/** In the middle of a square; where the margins cannot be equal, the first is the smaller. */
private class Padded(private val picture: Raster, side: Int, private val color: Int) : Raster {
    override val width = side
    override val height = side
    private val left = (side - picture.width) / 2
    private val top = (side - picture.height) / 2
    private val row = IntArray(picture.width)

    fun isMargin(y: Int) = y - top !in 0 until picture.height

    override fun row(
        y: Int,
        into: IntArray,
    ) {
        into.fill(color, 0, width)
        if (isMargin(y)) return
        picture.row(y - top, row)
        row.copyInto(into, left)
    }
}

/** What each place of a resized line takes of the line that it comes from, in fixed point. */
private class Weights(from: Int, val size: Int, filterSupport: Double, filter: (Double) -> Double) {
    private val firsts = IntArray(size)
    private val weights: Array<IntArray>

    init {
        val scale = from.toDouble() / size
        val filterScale = maxOf(scale, 1.0)
        val support = filterSupport * filterScale
        check(ceil(support) < Int.MAX_VALUE / 4)
        weights =
            Array(size) { place ->
                val center = (place + 0.5) * scale
                val first = maxOf((center - support + 0.5).toInt(), 0)
                val last = minOf((center + support + 0.5).toInt(), from)
                firsts[place] = first
                val step = 1.0 / filterScale
                val shares = DoubleArray(last - first) { filter((it + first - center + 0.5) * step) }
                var sum = 0.0
                for (share in shares) sum += share
                IntArray(shares.size) { index ->
                    val share = (if (sum != 0.0) shares[index] / sum else shares[index]) * ONE
                    (if (share < 0) share - 0.5 else share + 0.5).toInt()
                }
            }
    }

    fun horizontal(
        row: IntArray,
        into: Rgb,
        y: Int,
    ) {
        var at = 3 * into.width * y
        for (place in weights.indices) {
            val shares = weights[place]
            val first = firsts[place]
            var red = HALF
            var green = HALF
            var blue = HALF
            for (index in shares.indices) {
                val color = row[first + index]
                val share = shares[index]
                red += (color shr 16 and 255) * share
                green += (color shr 8 and 255) * share
                blue += (color and 255) * share
            }
            into.bytes[at++] = clip(red)
            into.bytes[at++] = clip(green)
            into.bytes[at++] = clip(blue)
        }
    }

    fun vertical(source: Rgb): Rgb {
        val line = 3 * source.width
        val found = Rgb(source.width, weights.size)
        val sums = IntArray(line)
        for (place in weights.indices) {
            sums.fill(HALF)
            val shares = weights[place]
            for (index in shares.indices) {
                val share = shares[index]
                val start = line * (firsts[place] + index)
                for (x in 0 until line) sums[x] += (source.bytes[start + x].toInt() and 255) * share
            }
            for (x in 0 until line) found.bytes[line * place + x] = clip(sums[x])
        }
        return found
    }

    private fun clip(sum: Int) = (sum shr BITS).coerceIn(0, 255).toByte()

    private companion object {
        const val BITS = 22
        const val ONE = 1 shl BITS
        const val HALF = 1 shl (BITS - 1)
    }
}
