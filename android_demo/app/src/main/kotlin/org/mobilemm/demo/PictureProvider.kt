package org.mobilemm.demo

import android.content.ContentProvider
import android.content.ContentValues
import android.content.Context
import android.database.Cursor
import android.database.MatrixCursor
import android.net.Uri
import android.os.ParcelFileDescriptor
import android.provider.OpenableColumns
import java.io.File
import java.io.FileNotFoundException

/**
 * Lets the camera's app write a picture into the conversation's folder, and another app read one that was drawn: the
 * one that its grant names.
 *
 * It needs no memory of what was asked for, because the system may end this process while the other app is open.
 */
class PictureProvider : ContentProvider() {
    override fun onCreate() = true

    override fun openFile(
        uri: Uri,
        mode: String,
    ): ParcelFileDescriptor {
        val file = file(uri) ?: throw FileNotFoundException("there is no $uri")
        return ParcelFileDescriptor.open(file, ParcelFileDescriptor.parseMode(mode))
    }

    override fun getType(uri: Uri) = if (uri.path.orEmpty().endsWith(Chat.DRAWING)) "image/png" else "image/jpeg"

    override fun query(
        uri: Uri,
        projection: Array<String>?,
        selection: String?,
        selectionArgs: Array<String>?,
        sortOrder: String?,
    ): Cursor {
        val cursor = MatrixCursor(arrayOf(OpenableColumns.DISPLAY_NAME, OpenableColumns.SIZE))
        file(uri)?.let { cursor.addRow(arrayOf<Any>(it.name, it.length())) }
        return cursor
    }

    override fun insert(
        uri: Uri,
        values: ContentValues?,
    ): Uri? = null

    override fun update(
        uri: Uri,
        values: ContentValues?,
        selection: String?,
        selectionArgs: Array<String>?,
    ) = 0

    override fun delete(
        uri: Uri,
        selection: String?,
        selectionArgs: Array<String>?,
    ) = 0

    private fun file(uri: Uri): File? {
        val name = uri.lastPathSegment ?: return null
        return if (NAME.matches(name)) (context!!.applicationContext as DemoApplication).chat.pictureFile(name) else null
    }

    companion object {
        private val NAME = Regex("[0-9a-f-]{36}(${Regex.escape(Chat.PICTURE)}|${Regex.escape(Chat.DRAWING)})")

        /** The address of a file of [Chat.pictureFile] for another app, which needs a grant besides. */
        fun offer(
            context: Context,
            file: File,
        ): Uri = Uri.Builder().scheme("content").authority("${context.packageName}.pictures").appendPath(file.name).build()
    }
}
