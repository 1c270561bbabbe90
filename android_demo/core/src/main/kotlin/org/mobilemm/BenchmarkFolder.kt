package org.mobilemm

import java.io.File
import java.io.IOException

/**
 * The folder through which a computer has bundles measured: on a phone, the app's external files.
 *
 * `bench/NAME` is a bundle that was put there. `OUT` is a result, and there when it is whole; until then `OUT.state` has
 * one line, `step: …` or, for good, `failed: …`.
 */
class BenchmarkFolder(val folder: File) {
    private val bundles = File(folder, "bench")

    /** Makes the bundles' place, which must belong to the app. */
    fun create() {
        bundles.mkdirs()
    }

    /** A bundle that was put there, checked as any other. Raises [MobileMMError]. */
    fun bundle(name: String): Bundle {
        if (!isPlainPath(name) || '/' in name) throw MobileMMError("${shown(name)}: is no name for a bundle")
        return Bundle.open(File(bundles, name))
    }

    /**
     * Keeps what `measure` finds, which reports its steps: the text of `out`.
     *
     * Raises [MobileMMError] as `measure` does, and when a file cannot be written.
     */
    fun write(
        out: String,
        measure: (report: (String) -> Unit) -> Map<String, Any?>,
    ): String {
        val state = File(folder, "$out.state")
        try {
            File(folder, out).delete()
            val result = measure { step -> state.writeText("step: $step\n") }
            val text = Json.write(listOf(result), indent = 1) + "\n"
            val draft = File(folder, ".$out.part")
            draft.writeText(text)
            if (!draft.renameTo(File(folder, out))) throw IOException("cannot be renamed")
            state.delete()
            return text
        } catch (error: MobileMMError) {
            runCatching { state.writeText("failed: ${error.message}\n") }
            throw error
        } catch (error: IOException) {
            val told = MobileMMError("${File(folder, out)}: cannot be written (${oneLine(error)})", error)
            runCatching { state.writeText("failed: ${told.message}\n") }
            throw told
        }
    }
}
