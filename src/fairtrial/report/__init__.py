"""What people look at: verdict tables, and later plots and pages."""
