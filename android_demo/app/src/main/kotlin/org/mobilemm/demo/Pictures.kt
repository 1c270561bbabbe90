package org.mobilemm.demo

import android.annotation.TargetApi
import android.content.ContentResolver
import android.content.ContentValues
import android.graphics.Bitmap
import android.graphics.BitmapFactory
import android.graphics.Matrix
import android.os.Build
import android.os.Environment
import android.provider.MediaStore
import org.mobilemm.MobileMMError
import org.mobilemm.Orientation
import org.mobilemm.Raster
import java.io.File
import java.io.IOException

/** Encoded pictures → upright pixels, by the system's decoder; and back. */
object Pictures {
    /** The longest side that is decoded: a phone's memory is no place for 100 megapixels. */
    private const val LONGEST = 4096
    private const val MOST_BYTES = 64L shl 20

    /** Raises [MobileMMError] for what the system cannot read. */
    fun decode(file: File): Raster {
        if (file.length() > MOST_BYTES) throw MobileMMError("${file.name}: the picture is too large")
        try {
            return BitmapRaster(bitmap(file.readBytes(), LONGEST, premultiplied = false))
        } catch (error: IOException) {
            throw MobileMMError("${file.name}: cannot be read", error)
        }
    }

    fun decode(encoded: ByteArray): Raster = BitmapRaster(bitmap(encoded, LONGEST, premultiplied = false))

    /** For a screen: no side longer than twice `longest`. Null for what cannot be read. */
    fun thumbnail(
        file: File,
        longest: Int,
    ): Bitmap? =
        try {
            bitmap(file.readBytes(), longest, premultiplied = true)
        } catch (_: MobileMMError) {
            null
        } catch (_: IOException) {
            null
        }

    /** As a PNG file. Raises [IOException]. */
    fun write(
        picture: Raster,
        file: File,
    ) {
        file.outputStream().use { if (!bitmap(picture).compress(Bitmap.CompressFormat.PNG, 100, it)) throw IOException("no PNG") }
    }

    /** As Android shows it. */
    fun bitmap(picture: Raster): Bitmap {
        val bitmap = Bitmap.createBitmap(picture.width, picture.height, Bitmap.Config.ARGB_8888)
        val row = IntArray(picture.width)
        for (y in 0 until picture.height) {
            picture.row(y, row)
            bitmap.setPixels(row, 0, picture.width, 0, y, picture.width, 1)
        }
        return bitmap
    }

    /** A picture of [write] for the gallery's apps, which need no permission for it since Android 10. Raises [IOException]. */
    @TargetApi(Build.VERSION_CODES.Q)
    fun addToGallery(
        resolver: ContentResolver,
        file: File,
        name: String,
    ) {
        val values = ContentValues()
        values.put(MediaStore.Images.Media.DISPLAY_NAME, name)
        values.put(MediaStore.Images.Media.MIME_TYPE, "image/png")
        values.put(MediaStore.Images.Media.RELATIVE_PATH, "${Environment.DIRECTORY_PICTURES}/mobilemm")
        // Not shown before it is whole.
        values.put(MediaStore.Images.Media.IS_PENDING, 1)
        val gallery = MediaStore.Images.Media.getContentUri(MediaStore.VOLUME_EXTERNAL_PRIMARY)
        val uri = resolver.insert(gallery, values) ?: throw IOException("no gallery")
        try {
            val stream = resolver.openOutputStream(uri) ?: throw IOException("no place")
            stream.use { to -> file.inputStream().use { it.copyTo(to) } }
            resolver.update(uri, ContentValues().apply { put(MediaStore.Images.Media.IS_PENDING, 0) }, null, null)
        } catch (error: IOException) {
            resolver.delete(uri, null, null)
            throw error
        }
    }

    private fun bitmap(
        encoded: ByteArray,
        longest: Int,
        premultiplied: Boolean,
    ): Bitmap {
        val options = BitmapFactory.Options()
        options.inJustDecodeBounds = true
        BitmapFactory.decodeByteArray(encoded, 0, encoded.size, options)
        options.inJustDecodeBounds = false
        options.inPremultiplied = premultiplied
        options.inPreferredConfig = Bitmap.Config.ARGB_8888
        options.inSampleSize = 1
        while (maxOf(options.outWidth, options.outHeight) / options.inSampleSize > longest) options.inSampleSize *= 2
        val found = BitmapFactory.decodeByteArray(encoded, 0, encoded.size, options) ?: throw MobileMMError("the picture cannot be read")
        val turn = upright(Orientation.of(encoded)) ?: return found
        return Bitmap.createBitmap(found, 0, 0, found.width, found.height, turn, false)
    }

    private fun upright(orientation: Int): Matrix? {
        if (orientation !in 2..8) return null
        val degrees = mapOf(3 to 180f, 5 to 90f, 6 to 90f, 7 to 270f, 8 to 270f)[orientation] ?: 0f
        val matrix = Matrix()
        matrix.setRotate(degrees)
        if (orientation in setOf(2, 5, 7)) matrix.postScale(-1f, 1f)
        if (orientation == 4) matrix.postScale(1f, -1f)
        return matrix
    }

    private class BitmapRaster(private val bitmap: Bitmap) : Raster {
        override val width get() = bitmap.width
        override val height get() = bitmap.height

        override fun row(
            y: Int,
            into: IntArray,
        ) = bitmap.getPixels(into, 0, width, 0, y, width, 1)
    }
}
