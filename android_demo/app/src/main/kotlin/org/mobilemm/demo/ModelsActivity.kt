package org.mobilemm.demo

import android.app.Activity
import android.app.AlertDialog
import android.content.Intent
import android.net.Uri
import android.os.Bundle
import android.text.InputType
import android.text.format.Formatter
import android.view.View
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ProgressBar
import android.widget.TextView
import org.mobilemm.MobileMMError
import java.io.IOException

/** The bundles on this device: use, delete, import from a file or a link. */
open class ModelsActivity : Activity() {
    private val app get() = application as DemoApplication
    private val imports get() = app.imports
    private val listener = { show() }

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.models)
        actionBar?.setDisplayHomeAsUpEnabled(true)
        findViewById<Button>(R.id.import_file).setOnClickListener {
            val intent = Intent(Intent.ACTION_OPEN_DOCUMENT).setType("*/*").addCategory(Intent.CATEGORY_OPENABLE)
            startActivityForResult(intent, OPEN)
        }
        findViewById<Button>(R.id.import_link).setOnClickListener { askForLink() }
        findViewById<Button>(R.id.cancel).setOnClickListener { imports.cancel() }
    }

    override fun onStart() {
        super.onStart()
        imports.listen(listener)
        show()
    }

    override fun onStop() {
        imports.unlisten(listener)
        super.onStop()
    }

    public override fun onActivityResult(
        requestCode: Int,
        resultCode: Int,
        data: Intent?,
    ) {
        if (requestCode == OPEN && resultCode == RESULT_OK) data?.data?.let(::importFile)
    }

    private fun importFile(uri: Uri) {
        val name = (uri.lastPathSegment ?: "").substringAfterLast('/').substringAfterLast(':').removeSuffix(".zip")
        val plain = name.filter { it in 'a'..'z' || it in 'A'..'Z' || it in '0'..'9' || it in "_-" }.take(60).ifEmpty { "imported" }
        val resolver = applicationContext.contentResolver
        imports.start { progress, _ ->
            val stream =
                try {
                    resolver.openInputStream(uri)
                } catch (error: IOException) {
                    throw MobileMMError("$plain: cannot be read", error)
                } catch (error: SecurityException) {
                    throw MobileMMError("$plain: cannot be read", error)
                } ?: throw MobileMMError("$plain: cannot be read")
            stream.use { app.models.library.importZip(it, plain) { done -> progress(done, 0) } }
        }
    }

    private fun askForLink() {
        val field = EditText(this)
        field.inputType = InputType.TYPE_CLASS_TEXT or InputType.TYPE_TEXT_VARIATION_URI
        field.setHint(R.string.link_hint)
        AlertDialog.Builder(this)
            .setTitle(R.string.import_link)
            .setView(field)
            .setNegativeButton(R.string.cancel, null)
            .setPositiveButton(R.string.ok) { _, _ -> importLink(field.text.toString()) }
            .show()
    }

    /** Of the folder that holds a bundle's manifest. */
    fun importLink(link: String) = imports.start { progress, cancelled -> app.models.library.download(link, progress, cancelled) }

    private fun show() {
        val list = findViewById<LinearLayout>(R.id.list)
        val names = app.models.library.names()
        val shown = names to app.models.chosen
        if (list.tag != shown || imports.state is Imports.State.Done) {
            list.tag = shown
            list.removeAllViews()
            for (name in names) list.addView(row(name))
        }
        val state = imports.state
        findViewById<TextView>(R.id.status).text =
            when (state) {
                is Imports.State.Running ->
                    if (state.total > 0) {
                        getString(R.string.importing_of, size(state.done), size(state.total))
                    } else {
                        getString(R.string.importing, size(state.done))
                    }
                is Imports.State.Done -> getString(R.string.imported, state.name)
                is Imports.State.Failed -> state.message
                Imports.State.Idle -> if (names.isEmpty()) getString(R.string.no_model) else ""
            }
        val running = state as? Imports.State.Running
        val progress = findViewById<ProgressBar>(R.id.progress)
        progress.visibility = if (running == null) View.GONE else View.VISIBLE
        progress.isIndeterminate = running != null && running.total == 0L
        if (running != null && running.total > 0) progress.progress = (1000 * running.done / running.total).toInt()
        findViewById<View>(R.id.cancel).visibility = if (running?.total ?: 0 > 0) View.VISIBLE else View.GONE
        for (id in listOf(R.id.import_file, R.id.import_link)) findViewById<View>(id).isEnabled = running == null
        findViewById<TextView>(R.id.space).text = getString(R.string.free_space, size(filesDir.usableSpace))
    }

    private fun size(bytes: Long) = Formatter.formatShortFileSize(this, bytes)

    private fun row(name: String): View {
        val row = layoutInflater.inflate(R.layout.model, findViewById<LinearLayout>(R.id.list), false)
        row.findViewById<TextView>(R.id.name).text = name
        row.findViewById<TextView>(R.id.about).text =
            try {
                val manifest = org.mobilemm.Bundle.readManifest(app.models.library.folder(name))
                val bits = manifest.parts.entries.joinToString { "${it.key} ${it.value.quantization.bits}" }
                getString(R.string.model_line, manifest.model.name, size(manifest.files.sumOf { it.bytes }), bits)
            } catch (error: MobileMMError) {
                error.message
            }
        val used = app.models.chosen == name
        val use = row.findViewById<Button>(R.id.use)
        use.setText(if (used) R.string.in_use else R.string.use)
        use.isEnabled = !used
        use.setOnClickListener {
            app.models.chosen = name
            show()
        }
        row.findViewById<Button>(R.id.delete).setOnClickListener { askToDelete(name) }
        return row
    }

    private fun askToDelete(name: String) {
        AlertDialog.Builder(this)
            .setMessage(getString(R.string.delete_question, name))
            .setNegativeButton(R.string.cancel, null)
            .setPositiveButton(R.string.delete) { _, _ -> imports.delete(name) }
            .show()
    }

    companion object {
        const val OPEN = 1
    }
}
