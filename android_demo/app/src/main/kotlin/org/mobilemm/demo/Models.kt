package org.mobilemm.demo

import android.content.Context
import android.content.res.AssetManager
import org.mobilemm.Bundle
import org.mobilemm.Library
import org.mobilemm.MobileMMError
import java.io.File
import java.io.FileNotFoundException

/** The bundles on this device, which of them is in use, and whether it was checked here. */
class Models(private val context: Context) {
    val library = Library(File(context.noBackupFilesDir, "models"))
    private val settings = context.getSharedPreferences("models", Context.MODE_PRIVATE)

    /** The one that conversations are held with; null when there is none. */
    var chosen: String?
        get() = settings.getString(CHOSEN, null)?.takeIf { it in library.names() } ?: library.names().firstOrNull()
        set(name) = settings.edit().putString(CHOSEN, name).apply()

    /** Whether this very bundle, on this very version of the app, has passed its self-check. */
    fun isChecked(bundle: Bundle) = settings.getString(CHECKED, null) == proof(bundle)

    fun keepChecked(bundle: Bundle) = settings.edit().putString(CHECKED, proof(bundle)).apply()

    private fun proof(bundle: Bundle): String {
        val version = context.packageManager.getPackageInfo(context.packageName, 0).versionName
        return "$version ${Bundle.sha256(bundle.folder, Bundle.MANIFEST)}"
    }

    /** Whether the app brings a bundle that is not unpacked yet. */
    fun hasPacked(): Boolean = library.names().isEmpty() && !settings.getBoolean(UNPACKED, false) && packed().isNotEmpty()

    /** Unpacks the bundle that comes with the app, checked as any other. Raises [MobileMMError]. */
    fun unpack() {
        val draft = File(library.folder, ".$PACKED.part")
        draft.deleteRecursively()
        try {
            for (path in packed()) {
                val target = File(draft, path)
                target.parentFile!!.mkdirs()
                context.assets.open("$PACKED/$path", AssetManager.ACCESS_STREAMING).use { from ->
                    target.outputStream().use { from.copyTo(it, 1 shl 16) }
                }
            }
            Bundle.open(draft)
            val name = File(library.folder, DEFAULT)
            if (!draft.renameTo(name)) throw MobileMMError("the model that comes with the app cannot be put in place")
            settings.edit().putBoolean(UNPACKED, true).apply()
        } catch (error: java.io.IOException) {
            throw MobileMMError("the model that comes with the app cannot be unpacked: is there free space?", error)
        } finally {
            draft.deleteRecursively()
        }
    }

    /** The packed files' paths, from the list that stands with them. */
    private fun packed(): List<String> =
        try {
            context.assets.open("$PACKED.files").bufferedReader().use { it.readLines() }.filter { it.isNotEmpty() }
        } catch (_: FileNotFoundException) {
            emptyList()
        }

    private companion object {
        const val CHOSEN = "chosen"
        const val CHECKED = "checked"
        const val UNPACKED = "unpacked"

        /** The assets' folder, and the name that the bundle gets. */
        const val PACKED = "bundle"
        const val DEFAULT = "mobilemm-default"
    }
}
