package org.mobilemm

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import javax.imageio.ImageIO

/** What the Python package has computed (`python -m tests.phone_vectors`), and the bundle that it did it with. */
object Vectors {
    val folder = File(System.getProperty("mobilemm.vectors") ?: error("-Dmobilemm.vectors=FOLDER is missing"))
    val bundleFolder = File(System.getProperty("mobilemm.bundle") ?: error("-Dmobilemm.bundle=FOLDER is missing"))

    /** A tiny bundle that draws, and what Python draws with it (`python -m tests.ios.drawing`). */
    val drawingFolder = File(System.getProperty("mobilemm.drawing") ?: error("-Dmobilemm.drawing=FOLDER is missing"))

    /** Opened and checked once; what runs it, on one thread as Python had it. */
    val bundle: Bundle by lazy { Bundle.open(bundleFolder) }
    val backend: Backend by lazy { Backend.open(bundle, threads = 1) }

    fun file(name: String) = File(folder, name)

    @Suppress("UNCHECKED_CAST")
    fun objects(name: String) = Json.parse(file(name).readBytes()) as List<Map<String, Any?>>

    @Suppress("UNCHECKED_CAST")
    fun map(name: String) = Json.parse(file(name).readBytes()) as Map<String, Any?>

    fun floats(name: String): FloatArray {
        val bytes = ByteBuffer.wrap(file(name).readBytes()).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
        return FloatArray(bytes.remaining()).also { bytes.get(it) }
    }

    /** By Java's decoder, which for PNG gives the pixels that every other gives. */
    fun picture(file: File): PixelRaster {
        val image = ImageIO.read(file)
        return PixelRaster(image.width, image.height, image.getRGB(0, 0, image.width, image.height, null, 0, image.width))
    }
}

@Suppress("UNCHECKED_CAST")
fun Map<String, Any?>.objects(key: String) = getValue(key) as List<Map<String, Any?>>

@Suppress("UNCHECKED_CAST")
fun Map<String, Any?>.ints(key: String) = (getValue(key) as List<Long>).map { it.toInt() }

@Suppress("UNCHECKED_CAST")
fun Map<String, Any?>.texts(key: String) = getValue(key) as List<String>

fun Map<String, Any?>.text(key: String) = getValue(key) as String

fun Map<String, Any?>.int(key: String) = (getValue(key) as Long).toInt()

fun Map<String, Any?>.number(key: String) = (getValue(key) as Number).toDouble()
