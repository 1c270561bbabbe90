package org.mobilemm

import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Test
import java.awt.image.BufferedImage
import java.awt.image.DataBufferByte
import java.io.ByteArrayOutputStream
import java.io.File
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
}

class BenchmarkTest {
    @Test fun `what it writes is for mobilemm to read`() {
        val settings = BenchmarkSettings(promptTokens = 20, newTokens = 4, runs = 2, threads = 1)
        val benchmark = Benchmark(Vectors.bundle, settings, Computer())
        val told = ArrayList<String>()
        val result = benchmark.run { told += it }
        assertEquals(listOf("measuring the device", "loading", "looking at photographs", "reading a prompt", "writing"), told)
        val figures = benchmark.found.associateBy { it.name }
        for (name in listOf("load_warm", "image", "vision", "ttft", "pp20", "tg4", "token")) {
            assertTrue(name, figures.getValue(name).runs.all { it > 0 })
        }
        assertEquals(8, figures.getValue("token").runs.size)
        // Read by the Python package in tests/android/test_benchmark_result.py, where there is one.
        File(Vectors.folder, "benchmark.json").writeText(Json.write(listOf(result), indent = 1))
    }
}
