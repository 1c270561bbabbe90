package org.mobilemm

import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertTrue
import org.junit.Test
import java.awt.image.BufferedImage
import java.awt.image.DataBufferByte
import java.io.ByteArrayOutputStream
import java.io.File
import java.nio.file.Files
import java.util.Random
import javax.imageio.ImageIO

/** This computer, for [Benchmark]. */
class Computer : Device {
    override val name = "host"
    override val system = "${System.getProperty("os.name")} ${System.getProperty("os.version")} ${System.getProperty("os.arch")}"
    override val processor = "JVM ${System.getProperty("java.version")}"
    override val memory = Runtime.getRuntime().maxMemory()

    override fun decode(encoded: ByteArray): Raster {
        ImageIO.setUseCache(false)
        val image = ImageIO.read(encoded.inputStream())
        // A JPEG's own bytes: getRGB asks the colour model for each pixel anew.
        val bytes = (image.raster.dataBuffer as? DataBufferByte)?.data.takeIf { image.type == BufferedImage.TYPE_3BYTE_BGR }
        val pixels =
            if (bytes == null) {
                image.getRGB(0, 0, image.width, image.height, null, 0, image.width)
            } else {
                IntArray(image.width * image.height) { index ->
                    val at = 3 * index
                    val red = bytes[at + 2].toInt() and 255
                    val green = bytes[at + 1].toInt() and 255
                    255 shl 24 or (red shl 16) or (green shl 8) or (bytes[at].toInt() and 255)
                }
            }
        return PixelRaster(image.width, image.height, pixels)
    }

    override fun photograph(seed: Int): ByteArray {
        val draw = Random(seed.toLong())
        val image = BufferedImage(1280, 960, BufferedImage.TYPE_INT_RGB)
        for (y in 0 until 960) for (x in 0 until 1280) image.setRGB(x, y, (200 * y / 960 + 55 * x / 1280 + draw.nextInt(24)).coerceAtMost(255) * 0x010101)
        return ByteArrayOutputStream().also { ImageIO.write(image, "jpg", it) }.toByteArray()
    }

    override fun power(): Double? = null

    override fun celsius(): Map<String, Double> = emptyMap()
}

class BenchmarkTest {
    @Test fun `what it writes is for mobilemm to read`() {
        val settings = BenchmarkSettings(promptTokens = 20, newTokens = 4, runs = 2, threads = 1)
        val benchmark = Benchmark(Vectors.bundle, settings, Computer())
        val told = ArrayList<String>()
        val result = benchmark.run { told += it }
        val phases = listOf("measuring the device", "loading", "looking at photographs", "reading a prompt", "writing", "drawing")
        assertEquals(phases, told)
        val figures = benchmark.found.associateBy { it.name }
        for (name in listOf("load_warm", "image", "vision", "ttft", "pp20", "tg4", "token", "draw", "draw_step")) {
            assertTrue(name, figures.getValue(name).runs.all { it > 0 })
        }
        assertEquals(8, figures.getValue("token").runs.size)
        assertEquals(Bundle.sha256(Vectors.bundle.folder, Bundle.MANIFEST), (result["bundle"] as Map<*, *>)["digest"])
        assertTrue("energy" in result["absent"] as Map<*, *>)
        // Read by the Python package in tests/android/test_benchmark_result.py, where there is one.
        File(Vectors.folder, "benchmark.json").writeText(Json.write(listOf(result), indent = 1))
    }

    @Test fun `steps are measured one by one where they are programs, else they share the drawing's time`() {
        val settings = BenchmarkSettings(promptTokens = 4, newTokens = 2, images = 0, runs = 2, threads = 1)

        fun drawn(folder: String): Pair<List<Double>, List<Double>> {
            val bundle = Bundle.open(File(Vectors.drawingFolder, folder))
            assertEquals(4, bundle.manifest.generation!!.steps)
            val figures = Benchmark(bundle, settings, Computer()).also { it.run() }.found.associateBy { it.name }
            return figures.getValue("draw").runs to figures.getValue("draw_step").runs
        }
        val (whole, shares) = drawn("drawer-onnx")
        assertEquals(whole.map { it / 4 }, shares)
        val (drawings, steps) = drawn("stepwise/drawer-onnx")
        assertEquals(2 * 4, steps.size)
        // Beside the steps a drawing takes what asks for it and what decodes it.
        drawings.zip(steps.chunked(4)) { drawing, own -> assertTrue("$drawing: $own", own.all { it > 0 } && own.sum() < drawing) }
    }

    @Test fun `a battery that tells its power gives joules a token`() {
        val settings = BenchmarkSettings(promptTokens = 8, newTokens = 4, images = 0, runs = 2, threads = 1)
        val phone =
            object : Device by Computer() {
                override fun power() = 5.0

                override fun celsius() = mapOf("battery" to 31.5)
            }
        val benchmark = Benchmark(Vectors.bundle, settings, phone)
        val result = benchmark.run()
        val figures = benchmark.found.associateBy { it.name }
        val perToken = figures.getValue("tg4").runs.map { 5 / it }
        figures.getValue("energy").runs.zip(perToken) { found, expected -> assertEquals(expected, found, 0.2 * expected) }
        assertFalse("energy" in result["absent"] as Map<*, *>)
        val after = (result["machine"] as Map<*, *>)["after"] as Map<*, *>
        assertEquals(31.5, (after["celsius"] as Map<*, *>)["battery"])
    }

    @Test fun `a computer finds the bundle's result, or why there is none`() {
        val folder = Files.createTempDirectory("files").toFile()
        val files = BenchmarkFolder(folder)
        files.create()
        Vectors.bundle.folder.copyRecursively(File(folder, "bench/one"))
        assertEquals(Vectors.bundle.manifest.model.name, files.bundle("one").manifest.model.name)
        for (name in listOf("../one", "..", "", ".one", "one/parts", "/etc", "o\u0000ne")) {
            val message = runCatching { files.bundle(name) }.exceptionOrNull()!!.message!!
            assertTrue(message, "is no name for a bundle" in message)
        }
        val state = File(folder, "out.json.state")
        files.write("out.json") { report ->
            report("loading")
            assertEquals("step: loading\n", state.readText())
            mapOf("found" to 1)
        }
        assertEquals(listOf(mapOf("found" to 1L)), Json.parse(File(folder, "out.json").readBytes()))
        assertEquals(setOf("bench", "out.json"), folder.list()!!.toSet())
        File(folder, "bench/one/manifest.json").appendText(" ")
        assertTrue(runCatching { files.write("out.json") { files.bundle("one"); emptyMap() } }.isFailure)
        assertTrue(state.readText(), state.readText().startsWith("failed: ") && "manifest.json" in state.readText())
        assertFalse(File(folder, "out.json").exists())
        folder.deleteRecursively()
    }
}
