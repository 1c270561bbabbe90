package org.mobilemm

import java.io.File
import java.io.IOException
import java.io.InputStream
import java.nio.file.Files
import java.nio.file.LinkOption
import java.nio.file.NoSuchFileException
import java.nio.file.Path
import java.security.MessageDigest
import kotlin.io.path.name

/**
 * A folder whose manifest and files hold together: the one place where a bundle's integrity is checked.
 *
 * Nothing that [open] has not looked at is ever loaded.
 */
class Bundle private constructor(val folder: File, val manifest: Manifest) {
    /** A listed file. Raises [MobileMMError] when the manifest lists no such file. */
    fun file(relative: String): File {
        if (manifest.files.none { it.path == relative }) {
            throw MobileMMError("${File(folder, MANIFEST)}: lists no file ${shown(relative)} under 'files'")
        }
        return File(folder, relative)
    }

    /** What a runtime opens to run this part. Raises [MobileMMError] when there is no such part. */
    fun partFile(name: String): File {
        val part =
            manifest.parts[name] ?: throw MobileMMError(
                "${File(folder, MANIFEST)}: there is no part ${shown(name)}; the bundle has " +
                    manifest.parts.keys.sorted().joinToString(),
            )
        return File(folder, part.file)
    }

    companion object {
        const val MANIFEST = "manifest.json"

        /** Beside it, as of `sha256sum manifest.json`: what tells a damaged manifest from another one. */
        const val MANIFEST_SHA256 = "manifest.json.sha256"

        /**
         * Opens and checks a bundle; no model is loaded.
         *
         * Always checked: the manifest and what it says of itself; that the folder holds the files that it lists, in
         * their sizes, and no other but hidden ones at its top; that ONNX parts refer to their own files alone. With
         * `verify` also the files' SHA-256. Raises [MobileMMError], one line, at the first fault.
         */
        fun open(
            folder: File,
            verify: Boolean = true,
        ): Bundle {
            val manifest = readManifest(folder)
            refuseUnlisted(folder, manifest)
            for (file in manifest.files) {
                plain(folder, file.path)
                val found = File(folder, file.path).length()
                if (found != file.bytes) {
                    throw MobileMMError(
                        "${File(folder, file.path)}: has $found bytes; the manifest says ${file.bytes}; $AGAIN",
                    )
                }
            }
            if (verify) {
                for (file in manifest.files) {
                    if (sha256(folder, file.path) != file.sha256) {
                        throw MobileMMError(
                            "${File(folder, file.path)}: damaged or changed: its SHA-256 is not what the manifest says; $AGAIN",
                        )
                    }
                }
            }
            if (manifest.target == "onnx") manifest.parts.keys.forEach { OnnxCheck.check(folder, manifest, it) }
            return Bundle(folder, manifest)
        }

        /** The checked `manifest.json` of a folder; the files it lists are not looked at. */
        fun readManifest(folder: File): Manifest {
            if (!folder.isDirectory) throw MobileMMError("$folder: there is no such folder; give the folder of a bundle")
            if (!Files.exists(folder.toPath().resolve(MANIFEST), LinkOption.NOFOLLOW_LINKS)) {
                throw MobileMMError("$folder: is no bundle, because it has no $MANIFEST; `mobilemm export` makes one")
            }
            val data = openPlain(folder, MANIFEST).use { it.readAtMost(ManifestReader.LARGEST + 1) }
            val manifest = ManifestReader.parse(data, File(folder, MANIFEST).path)
            if (Files.exists(folder.toPath().resolve(MANIFEST_SHA256), LinkOption.NOFOLLOW_LINKS)) {
                val said = openPlain(folder, MANIFEST_SHA256).use { it.readAtMost(200) }
                if (!said.contentEquals(manifestDigest(data))) {
                    throw MobileMMError(
                        "${File(folder, MANIFEST)}: damaged or changed: its SHA-256 is not what $MANIFEST_SHA256 says; $AGAIN",
                    )
                }
            }
            return manifest
        }

        /** What `manifest.json.sha256` holds for a manifest of these bytes. */
        fun manifestDigest(data: ByteArray) = "${hex(MessageDigest.getInstance("SHA-256").digest(data))}  $MANIFEST\n".toByteArray()

        /** The SHA-256 of a plain file in a folder, in hexadecimal. */
        fun sha256(
            folder: File,
            relative: String,
        ): String {
            val digest = MessageDigest.getInstance("SHA-256")
            openPlain(folder, relative).use { stream ->
                val buffer = ByteArray(1 shl 16)
                try {
                    while (true) {
                        val count = stream.read(buffer)
                        if (count < 0) break
                        digest.update(buffer, 0, count)
                    }
                } catch (error: IOException) {
                    throw MobileMMError("${File(folder, relative)}: cannot be read (${oneLine(error)})", error)
                }
            }
            return hex(digest.digest())
        }

        internal fun hex(bytes: ByteArray) = bytes.joinToString("") { (it.toInt() and 0xff).toString(16).padStart(2, '0') }

        /** Opens a file of a folder, when it and the folders between are what they seem: no links, no pipes. */
        internal fun openPlain(
            folder: File,
            relative: String,
        ): InputStream {
            val path = plain(folder, relative)
            return try {
                Files.newInputStream(path, LinkOption.NOFOLLOW_LINKS)
            } catch (error: IOException) {
                throw MobileMMError("$path: cannot be read (${oneLine(error)})", error)
            }
        }

        private fun plain(
            folder: File,
            relative: String,
        ): Path {
            val parts = relative.split('/')
            var path = folder.toPath()
            for ((index, part) in parts.withIndex()) {
                path = path.resolve(part)
                val attributes =
                    try {
                        Files.readAttributes(
                            path,
                            java.nio.file.attribute.BasicFileAttributes::class.java,
                            LinkOption.NOFOLLOW_LINKS,
                        )
                    } catch (error: NoSuchFileException) {
                        throw MobileMMError("$path: is missing; $AGAIN", error)
                    } catch (error: IOException) {
                        throw MobileMMError("$path: cannot be read (${oneLine(error)})", error)
                    }
                val fits = if (index < parts.lastIndex) attributes.isDirectory else attributes.isRegularFile
                if (!fits) throw MobileMMError("$path: is a link or no plain file; $AGAIN")
            }
            return path
        }

        private fun refuseUnlisted(
            folder: File,
            manifest: Manifest,
        ) {
            val listed = hashSetOf(MANIFEST, MANIFEST_SHA256)
            val parents = HashSet<String>()
            for (file in manifest.files) {
                listed += file.path
                var end = file.path.lastIndexOf('/')
                while (end > 0) {
                    parents += file.path.substring(0, end)
                    end = file.path.lastIndexOf('/', end - 1)
                }
            }
            val root = folder.toPath()
            try {
                refuseUnlisted(root, "", listed, parents)
            } catch (error: IOException) {
                throw MobileMMError("$folder: cannot be read (${oneLine(error)})", error)
            }
        }

        private fun refuseUnlisted(
            folder: Path,
            inside: String,
            listed: Set<String>,
            parents: Set<String>,
        ) {
            Files.newDirectoryStream(folder).use { entries ->
                for (entry in entries) {
                    if (inside.isEmpty() && entry.name.startsWith(".")) continue
                    val relative = inside + entry.name
                    if (relative !in listed && relative !in parents) {
                        throw MobileMMError(
                            "${folder.resolve(MANIFEST)}: the manifest does not list ${shown(relative)}, which lies in the" +
                                " folder; remove it",
                        )
                    }
                    if (Files.isDirectory(entry, LinkOption.NOFOLLOW_LINKS)) refuseUnlisted(entry, "$relative/", listed, parents)
                }
            }
        }

        private const val AGAIN = ManifestReader.AGAIN
    }
}

/** At most `most` bytes of a stream. */
internal fun InputStream.readAtMost(most: Int): ByteArray {
    val out = java.io.ByteArrayOutputStream()
    val buffer = ByteArray(1 shl 14)
    while (out.size() < most) {
        val count = read(buffer, 0, minOf(buffer.size, most - out.size()))
        if (count < 0) break
        out.write(buffer, 0, count)
    }
    return out.toByteArray()
}
