package org.mobilemm

import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import java.io.File
import kotlin.math.log10

/** What Python's session drew (`tests.ios.drawing.write_drawings`), case by case. */
@Suppress("UNCHECKED_CAST")
fun cases(folder: File) = Json.parse(File(folder, "drawings.json").readBytes()) as List<Map<String, Any?>>

/** Of [Noise]: as [Sampling] takes it. */
private fun seed(case: Map<String, Any?>) = case.text("seed").toULong().toLong()

fun sampling(case: Map<String, Any?>) = Sampling(maxNewTokens = case.int("max_new_tokens"), seed = seed(case))

private fun psnr(
    picture: PixelRaster,
    rgb: ByteArray,
): Double {
    assertEquals(rgb.size, 3 * picture.width * picture.height)
    var squares = 0.0
    val row = IntArray(picture.width)
    for (y in 0 until picture.height) {
        picture.row(y, row)
        for (x in row.indices) {
            assertEquals(255, row[x] ushr 24)
            for (channel in 0 until 3) {
                val wanted = rgb[3 * (y * picture.width + x) + channel].toInt() and 255
                val difference = (row[x] ushr (16 - 8 * channel) and 255) - wanted
                squares += difference.toDouble() * difference
            }
        }
    }
    return if (squares == 0.0) 99.0 else 10 * log10(255.0 * 255 * rgb.size / squares)
}

fun drawsAsPython(
    bundle: Bundle,
    backend: Backend,
    folder: File,
    sketches: Int = 0,
) {
    for (case in cases(folder)) {
        Session(bundle, backend, sampling(case), keepVision = false, sketches = true).use { session ->
            val pieces = ArrayList<Piece>()
            val answer = session.stream(case.text("question")) { pieces += it }
            assertEquals(case.text("text"), answer)
            assertEquals(answer, pieces.joinToString("") { it.text })
            assertEquals(case.ints("ids"), session.answerIds)
            assertEquals(case.text("memory"), session.messages.last().text)
            val drawing = listOf(Drawing::class) + List(sketches) { Sketch::class } + Drawn::class
            assertEquals(drawing, pieces.filter { it !is Words }.map { it::class })
            for (sketch in pieces.filterIsInstance<Sketch>()) {
                val rgb = File(folder, "${case.text("seed")}-${sketch.step}.rgb").readBytes()
                assertTrue("step ${sketch.step} of ${sketch.steps}", psnr(sketch.picture, rgb) >= 45)
            }
            val drawn = pieces.filterIsInstance<Drawn>().single()
            assertEquals(case.text("seed"), drawn.seed.toString())
            assertEquals(listOf(case.int("width"), case.int("height")), listOf(drawn.picture.width, drawn.picture.height))
            assertTrue(drawn.seconds > 0 && session.stats!!.drawingSeconds == drawn.seconds)
            val ratio = psnr(drawn.picture, File(folder, case.text("file")).readBytes())
            println("seed %s: %.1f dB to Python's picture of %s".format(drawn.seed, ratio, bundle.manifest.model.name))
            assertTrue("$ratio dB", ratio >= 45)
        }
    }
}
