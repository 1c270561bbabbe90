package org.mobilemm

import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.io.InputStream
import java.net.HttpURLConnection
import java.net.URL
import java.util.zip.ZipException
import java.util.zip.ZipInputStream

/**
 * Bundles on this device, each in a folder of its own below `folder`; whole and checked, or not there.
 *
 * What is not finished lies in a folder that begins with a dot, and is taken up again.
 */
class Library(val folder: File) {
    /** Of the bundles that are there. */
    fun names(): List<String> =
        (folder.listFiles() ?: emptyArray()).filter { it.isDirectory && !it.name.startsWith(".") }.map { it.name }.sorted()

    fun folder(name: String) = File(folder, checked(name))

    fun delete(name: String) {
        val gone = File(folder, ".${checked(name)}.deleted")
        // By renaming first: what is half deleted is no bundle.
        if (!folder(name).renameTo(gone)) throw MobileMMError("$name: cannot be deleted")
        gone.deleteRecursively()
    }

    /**
     * Imports the zip of a bundle's folder. `progress` gets the bytes that were written so far.
     *
     * Raises [MobileMMError] for whatever is no bundle, damaged, or would not fit; nothing of it is left then.
     */
    fun importZip(
        zip: InputStream,
        name: String,
        progress: (Long) -> Unit = {},
    ): Bundle {
        val draft = draft(name)
        draft.deleteRecursively()
        try {
            unpack(zip, draft, name, progress)
            return finish(draft, name)
        } catch (error: MobileMMError) {
            draft.deleteRecursively()
            throw error
        } catch (error: IOException) {
            draft.deleteRecursively()
            throw MobileMMError("$name: cannot be imported (${oneLine(error)})", error)
        }
    }

    private fun unpack(
        zip: InputStream,
        draft: File,
        name: String,
        progress: (Long) -> Unit,
    ) {
        val buffer = ByteArray(1 shl 16)
        var total = 0L
        var top: String? = null
        var count = 0
        ZipInputStream(zip).use { stream ->
            while (true) {
                val entry =
                    try {
                        stream.nextEntry
                    } catch (error: ZipException) {
                        throw MobileMMError("$name: is no zip file, or damaged (${oneLine(error)})", error)
                    } catch (error: IllegalArgumentException) {
                        throw MobileMMError("$name: is no zip file, or damaged", error)
                    } ?: break
                if (entry.isDirectory) continue
                if (++count > MOST_FILES) throw MobileMMError("$name: holds more than $MOST_FILES files; it is no bundle")
                // The folder itself may have been zipped, or what is in it.
                if (count == 1 && entry.name.endsWith("/${Bundle.MANIFEST}")) top = entry.name.removeSuffix(Bundle.MANIFEST)
                if (count == 1 && top == null && '/' in entry.name && entry.name.substringBefore('/') !in INNER) {
                    top = entry.name.substringBefore('/') + "/"
                }
                val path = entry.name.removePrefix(top ?: "")
                // What file managers leave behind.
                val hidden = path.startsWith(".") && path.substringBefore('/') !in setOf(".", "..")
                if (hidden || entry.name.startsWith("__MACOSX/")) continue
                if (!isPlainPath(path)) throw MobileMMError("$name: holds ${shown(path)}, which is no plain path inside a bundle")
                val target = File(draft, path)
                target.parentFile!!.mkdirs()
                FileOutputStream(target).use { out ->
                    while (true) {
                        val read = stream.read(buffer)
                        if (read < 0) break
                        total += read
                        if (folder.usableSpace < RESERVE) throw noSpace(name)
                        out.write(buffer, 0, read)
                        progress(total)
                    }
                }
            }
        }
        if (count == 0) throw MobileMMError("$name: is no zip file, or holds nothing")
    }

    /**
     * Downloads a bundle's folder from a server, file by file, each checked against the manifest.
     *
     * What is broken off goes on where it stopped at the next call. `cancelled` is asked between pieces.
     * Raises [MobileMMError] when the server or the network fails, and for whatever is no bundle, or damaged.
     */
    fun download(
        link: String,
        progress: (done: Long, total: Long) -> Unit = { _, _ -> },
        cancelled: () -> Boolean = { false },
    ): Bundle {
        val base = link.trim().trimEnd('/').removeSuffix("/${Bundle.MANIFEST}")
        if (!base.startsWith("https://") && !base.startsWith("http://")) {
            throw MobileMMError("${shown(link)}: is no link to a bundle's folder; it must begin with https://")
        }
        val name = checked(base.substringAfterLast('/').ifEmpty { "bundle" }.filter { it.isLetterOrDigit() || it in "._-" })
        val draft = draft(name)
        try {
            draft.mkdirs()
            val data = open("$base/${Bundle.MANIFEST}", 0).use { it.inputStream.readAtMost(ManifestReader.LARGEST + 1) }
            val manifest = ManifestReader.parse(data, "$base/${Bundle.MANIFEST}")
            val known = File(draft, Bundle.MANIFEST)
            // Of another version of the bundle nothing is of use.
            if (known.isFile && !known.readBytes().contentEquals(data)) draft.deleteRecursively()
            draft.mkdirs()
            known.writeBytes(data)
            val total = manifest.files.sumOf { it.bytes }
            val missing = total - manifest.files.sumOf { minOf(it.bytes, File(draft, it.path).length()) }
            if (folder.usableSpace < missing + RESERVE) throw noSpace(name)
            var done = 0L
            for (file in manifest.files) {
                download(base, draft, file, cancelled) { progress(done + it, total) }
                done += file.bytes
            }
            return finish(draft, name)
        } catch (error: IOException) {
            throw MobileMMError("$base: the download broke off (${oneLine(error)}); try again, it goes on where it stopped", error)
        }
    }

    private fun download(
        base: String,
        draft: File,
        file: BundleFile,
        cancelled: () -> Boolean,
        progress: (Long) -> Unit,
    ) {
        val target = File(draft, file.path)
        target.parentFile!!.mkdirs()
        if (target.length() > file.bytes) target.delete()
        if (target.length() < file.bytes || !target.exists()) {
            val have = target.length()
            if (file.bytes == 0L) {
                target.createNewFile()
            } else {
                open("$base/${file.path}", have).use { connection ->
                    val goesOn = connection.responseCode == HttpURLConnection.HTTP_PARTIAL
                    var length = if (goesOn) have else 0L
                    FileOutputStream(target, goesOn).use { out ->
                        val buffer = ByteArray(1 shl 16)
                        while (length < file.bytes) {
                            if (cancelled()) throw Cancelled()
                            val read = connection.inputStream.read(buffer, 0, minOf(buffer.size.toLong(), file.bytes - length).toInt())
                            if (read < 0) throw IOException("${file.path} ended after $length of ${file.bytes} bytes")
                            out.write(buffer, 0, read)
                            length += read
                            progress(length)
                        }
                    }
                }
            }
        }
        if (Bundle.sha256(draft, file.path) != file.sha256) {
            target.delete()
            throw MobileMMError("$base/${file.path}: damaged: its SHA-256 is not what the manifest says; try again")
        }
        progress(file.bytes)
    }

    /** A server's answer; `from` asks for what follows that byte. */
    private fun open(
        link: String,
        from: Long,
    ): Connection {
        val connection = URL(link).openConnection() as HttpURLConnection
        connection.connectTimeout = TIMEOUT
        connection.readTimeout = TIMEOUT
        // Packed in transit, a file would have another length.
        connection.setRequestProperty("Accept-Encoding", "identity")
        if (from > 0) connection.setRequestProperty("Range", "bytes=$from-")
        val code = connection.responseCode
        val range = connection.getHeaderField("Content-Range") ?: ""
        val fits = code == HttpURLConnection.HTTP_OK || (code == HttpURLConnection.HTTP_PARTIAL && range.startsWith("bytes $from-"))
        if (!fits) {
            connection.disconnect()
            throw MobileMMError("$link: the server answers ${connection.responseCode} ${connection.responseMessage ?: ""}".trim())
        }
        return Connection(connection)
    }

    private class Connection(private val connection: HttpURLConnection) : AutoCloseable {
        val responseCode: Int get() = connection.responseCode
        val inputStream: InputStream get() = connection.inputStream

        override fun close() = connection.disconnect()
    }

    private fun draft(name: String) = File(folder, ".${checked(name)}.part")

    private fun finish(
        draft: File,
        name: String,
    ): Bundle {
        Bundle.open(draft)
        val target = folder(name)
        if (target.exists()) delete(name)
        if (!draft.renameTo(target)) throw MobileMMError("$name: cannot be put in place")
        return Bundle.open(target, verify = false)
    }

    private fun noSpace(name: String) = MobileMMError("$name: there is not enough free space on this device; delete something first")

    private fun checked(name: String): String {
        if (!isPlainPath(name) || '/' in name) throw MobileMMError("${shown(name)}: is no name for a bundle")
        return name
    }

    private companion object {
        const val TIMEOUT = 20_000
        const val MOST_FILES = 10_000

        /** What is left free for others. */
        const val RESERVE = 64L shl 20

        /** Folders of a bundle, which are not the bundle's own. */
        val INNER = setOf("parts", "golden")
    }
}
